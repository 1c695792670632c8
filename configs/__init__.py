"""Settings as dataclasses, the flags that come of them, errors and translations. The standard library alone."""
