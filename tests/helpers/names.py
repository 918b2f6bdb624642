"""Names that people give to folders, classes and tasks, and some that an attacker would give."""

NASTY = (
    *(
        "birds [v2]",
        "[/bold] [red]",
        "a=b",
        "50%",
        "x#1",
        "a,b",
        'a "quote"',
        "it's",
        "a;b",
        ":cat:",
        "$\\alpha$",
        "a$b",
    ),
    *("_private", "__init__", "<b>bold</b>", "<script>alert(1)</script>", "&lt;i&gt; &amp;", "`x`", "a|b", "~~no~~"),
    *("*em* _em_", "[link](http://a.b)", "new\nline", "\x1b[31mred", "nul\x00", "bell\x07", "tab\tin", "\ttab", "a--b"),
    *("=cmd()", "+1+1", "-1+1", "@SUM(A1)", "\uff1dcmd()", "-5", "\u00dcn\u00efcode", "\u540d\u524d", "\U0001f431 cat"),
    *(
        "e\u0301",
        "trailing\\",
        "a\\$b",
        "caf\udce9",
        "\ud800",
        "right\u202eleft",
        "line\u2028end",
        "{curly} ^~",
        "a  b",
    ),
    *("\ufffe", "x" * 230, "?query=1&b=2#c", "../up", "C:\\dir"),
)
