"""Where the runs of a command are made: in this process, in processes of this machine, or on a Ray cluster.

`drive.Engine` is the interface of the three; `choose.opened` gives the one that `engine=` names.
"""
