"""Errors that a user can act on.

The message of each is one line that names the key, file, layer or artifact at fault. The command line prints it and
exits with status 2. Any other exception is a defect of the software and keeps its traceback.

Messages show no secrets of URLs: ``MlorqError`` hides them, and ``no_secrets`` those of exceptions of other libraries.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

_WORDS = "sig|token|key|secret|pass|pwd|auth|cred|jwt|session"
_NAMED = r"[\w-]*(?:secret|password|passwd|token|api_?key|access_?key|account_?key|connection_string|credential)[\w-]*"
_HIDDEN = (
    # A password, which may have any characters; not the port of a host, nor the next part of a chained URL.
    (re.compile(r"(://[^/?#@:\s]*):(?!\d{1,5}/|:\w[\w+.-]*://)\S*@"), r"\1:***@"),
    # The same without its scheme, as drivers show it; not the digest of an image.
    (re.compile(r"((?<![\w/:@.+-])[\w.+-]*):(?!//)[^\s/:@'\"]+@(?!sha256:)(?=\w)"), r"\1:***@"),
    (re.compile(r"(https?://)[^/?#@:\s]+@"), r"\1***@"),  # a token in place of a user's name
    (re.compile(rf"([?&;][\w.%-]*(?:{_WORDS})[\w.%-]*=)[^&;#\s'\"]+", re.IGNORECASE), r"\1***"),
    (re.compile(r"(AccountKey=|SharedAccessSignature=|Bearer )[^;\s'\"]+"), r"\1***"),
    (re.compile(rf"(['\"]{_NAMED}['\"]\s*:\s*(['\"]))[^'\"]+(?=\2)", re.IGNORECASE), r"\1***"),  # options of drivers
    (re.compile(r"(\b[A-Z0-9_]*(?:SECRET|PASSWORD|TOKEN|ACCESS_KEY)[A-Z0-9_]*=)[^\s'\",;]+"), r"\1***"),  # variables
)
SECRET_KEY = re.compile(
    r"(?:(?:use_|hf_)?(?:auth_|access_)?token|.*(?:secret|password|passwd|(?:api|access|account|secret)_?key"
    r"|connection_string|sas_token))",
    re.IGNORECASE,
)


def hide_secrets(text: str) -> str:
    """A text with its secrets replaced by ``***``: passwords, tokens and signatures of URLs, and named credentials."""
    for pattern, shown in _HIDDEN:
        text = pattern.sub(shown, text)
    return text


# Names in files and configurations may hold line breaks, and characters that change what a terminal shows.
_CONTROL = re.compile(r"\s*[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]+\s*")


class MlorqError(Exception):
    """Base class of errors caused by the input or the environment, not by a defect of the software.

    Args:
        message: becomes one line: spaces replace line breaks and other control characters. Secrets of URLs are hidden.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(_CONTROL.sub(" ", hide_secrets(str(message))).strip())


class ConfigError(MlorqError):
    """A configuration key or value is wrong."""


class ModelError(MlorqError):
    """The model cannot be loaded or cannot be compressed."""


class DataError(MlorqError):
    """Calibration or evaluation data is missing, empty or malformed."""


class StoreError(MlorqError):
    """The artifact store cannot be read or written, or an artifact is damaged."""


class BudgetError(MlorqError):
    """No configuration fits the memory budget."""


class CheckpointError(MlorqError):
    """A compressed checkpoint is missing, is damaged, or does not fit the model it is loaded into."""


class TransientError(MlorqError):
    """A transient fault of a machine or a network, such as a killed worker: a retry may succeed."""


KINDS: dict[str, type[MlorqError]] = {
    kind.__name__: kind
    for kind in (ConfigError, ModelError, DataError, StoreError, BudgetError, CheckpointError, TransientError)
}


def one_line(error: Exception) -> str:
    """The message of an error without line breaks and secrets, cut to 300 characters."""
    return hide_secrets(" ".join(str(error).split()))[:300]


@contextmanager
def no_secrets() -> Iterator[None]:
    """Exceptions that leave a ``with`` block or a decorated function show no secrets of URLs.

    An exception of another library with a secret becomes a ``MlorqError``; as a cause, it is removed.
    """
    try:
        yield
    except Exception as error:
        if _tells(error):
            raise MlorqError(f"{type(error).__name__}: {one_line(error)}") from None
        link: BaseException = error
        while (cause := link.__cause__ or link.__context__) is not None:
            if _tells(cause):
                link.__cause__ = link.__context__ = None
                break
            link = cause
        raise


def _tells(error: BaseException) -> bool:
    text = str(error)
    return hide_secrets(text) != text
