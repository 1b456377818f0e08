"""A URL of Google Cloud Storage -> bucket, key, and the settings of obstore's client."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tlbatch.storage.obstore_client import Address, as_settings, split

#: Protocols of Google Cloud Storage.
PROTOCOLS = ("gs", "gcs")
#: Storage options, and the settings of obstore that they are; those of gcsfs that change nothing here are None.
_OPTIONS = {"anon": "skip_signature", "endpoint_url": "base_url", "project": None, "token": None}


def address(url: str, options: Mapping[str, Any]) -> Address:
    """Where a URL leads, and what the client needs to go there.

    Credentials come from the environment: `GOOGLE_APPLICATION_CREDENTIALS`, the login of gcloud, or the machine's account.

    Raises:
        ConfigError: an option is unknown.
    """
    bucket, key = split(url)
    settings = as_settings("gs", options, _OPTIONS)
    if options.get("token") == "anon":  # as gcsfs writes it
        settings["skip_signature"] = True
    return Address(bucket, key, settings)
