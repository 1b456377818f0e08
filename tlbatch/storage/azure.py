"""A URL of Azure Blob Storage -> container, key, and the settings of obstore's client.

`az://container/key` and `abfs://container/key` take the account from the environment or the options,
`abfss://container@account.dfs.core.windows.net/key` names it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from tlbatch.errors import ConfigError
from tlbatch.storage.obstore_client import Address, as_settings, split

#: Protocols of Azure.
PROTOCOLS = ("az", "azure", "abfs", "abfss")
#: Storage options, and the settings of obstore that they are.
_OPTIONS = {
    "account_name": "account_name",
    "anon": "skip_signature",
    "authority_host": "authority_host",
    "client_id": "client_id",
    "endpoint_url": "endpoint",
    "tenant_id": "tenant_id",
    "use_azure_cli": "use_azure_cli",
}
#: Parts of a connection string, and the settings that they are.
_CONNECTION = {
    "AccountName": "account_name",
    "AccountKey": "account_key",
    "SharedAccessSignature": "sas_key",
    "BlobEndpoint": "endpoint",
}
_HOST, _PUBLIC = ".dfs.", "core.windows.net"


def address(url: str, options: Mapping[str, Any]) -> Address:
    """Where a URL leads, and what the client needs to go there.

    The account comes from the URL, the options, `AZURE_STORAGE_CONNECTION_STRING` or `AZURE_STORAGE_ACCOUNT_NAME`; credentials
    come from the environment, where obstore also finds those of an identity.

    Raises:
        ConfigError: an option is unknown, the connection string cannot be read, or there is no account.
    """
    container, key = split(url)
    settings = {**_connection(), **as_settings("az", options, _OPTIONS)}
    container, at, host = container.partition("@")
    if at:
        account, _, rest = host.partition(_HOST)
        settings["account_name"] = account.partition(".")[0]
        if rest and rest != _PUBLIC:  # another cloud, as that of China
            settings.setdefault("endpoint", f"https://{account}.blob.{rest}")
    named = ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT", "AZURE_STORAGE_USE_EMULATOR")
    if not settings.keys() & {"account_name", "endpoint"} and not any(os.environ.get(name) for name in named):
        raise ConfigError(
            f"{url}: nothing says which storage account this is. Set AZURE_STORAGE_ACCOUNT_NAME, write "
            "abfss://CONTAINER@ACCOUNT.dfs.core.windows.net/…, or use the storage option account_name."
        )
    return Address(container, key, settings)


def _connection() -> dict[str, Any]:
    """The settings in the connection string of the environment, which obstore does not read."""
    text = os.environ.get("AZURE_STORAGE_CONNECTION_STRING", "").strip()
    parts = [part.partition("=") for part in text.split(";") if part.strip()]
    if any(not equals for _, equals, _ in parts):
        raise ConfigError("AZURE_STORAGE_CONNECTION_STRING has a part without '=': write Name=value;Name=value.")
    found = {_CONNECTION[name.strip()]: value.strip() for name, _, value in parts if name.strip() in _CONNECTION}
    suffix = next((value for name, _, value in parts if name.strip() == "EndpointSuffix"), _PUBLIC)
    if suffix != _PUBLIC and "account_name" in found:
        found.setdefault("endpoint", f"https://{found['account_name']}.blob.{suffix}")
    return found
