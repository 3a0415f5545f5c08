"""The one exception that means "your input is wrong, and here is what to do"."""


class InputError(Exception):
    """Bad input, said in one sentence: what is wrong, where (file and line, or config key), what to do.

    Entry points print the sentence without a traceback and exit with code 2 (see `launch/entry.py`).
    """
