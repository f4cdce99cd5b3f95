"""The anchor of a heading as Jupyter makes it, so that one link works in JupyterLab and in the book."""


def jupyter_anchor(title: str) -> str:
    """Blanks become dashes, everything else stays.

    >>> jupyter_anchor("4. Greedy longest match")
    '4.-Greedy-longest-match'
    """
    return title.replace(" ", "-")
