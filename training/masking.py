"""Secrets out of what people read: records, logs, messages. What has to run keeps them."""

import logging
import re
from typing import Any

_SECRETS = (  # each a place to keep, and what is hidden after it
    r"(://)[^/\s'\"@]+(?=@)",  # user:password
    # of a signed URL the whole query: the parts of a signature have many names
    r"(\?)[^\s'\"]*(?:sig|signature|token|credential|key|secret|password)=[^\s'\"]*",
    r"((?:authorization|cookie|token|secret|passw(?:or)?d|(?:api|access|secret)[-_]?key)"
    r"\s*[:=]\s*(?:(?:bearer|basic|token|digest)\s+)?)[^\s'\"]+",
    r"(\s(?:-u|--user|--password)[ =]['\"]?)[^\s'\"]+",
    r"(\bhf_)\w+",
)
_SECRET = [re.compile(secret, re.IGNORECASE) for secret in _SECRETS]


def masked(value: Any) -> Any:
    """A URL, command or message without passwords, tokens and signatures; or a JSON value of such.

    Masked twice it does not change: what a run recorded can be compared with what it is given.
    """
    if isinstance(value, dict):
        return {key: masked(each) for key, each in value.items()}
    if isinstance(value, list):
        return [masked(each) for each in value]
    if isinstance(value, str):
        for secret in _SECRET:
            value = secret.sub(r"\1***", value)
    return value


class MaskingFormatter(logging.Formatter):
    """A log's lines, masked."""

    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record))
