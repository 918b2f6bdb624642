"""Downloads, archives and readers of original files."""
