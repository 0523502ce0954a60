"""Names forerun's connector to vLLM, which runs this in each of its processes (entry point `vllm.general_plugins`)."""

from __future__ import annotations

from contextlib import suppress

__all__ = ["register"]


def register() -> None:
    """Makes "RunaheadConnector" known by name: its module is imported once an engine asks for it, not before.

    Whatever vLLM this is, engines that do not name the connector are left as they are.
    """
    try:
        from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    except ImportError:  # a release without connectors; one that names ours is told so there
        return
    with suppress(ValueError):  # it is known already: vLLM calls this more than once
        KVConnectorFactory.register_connector("RunaheadConnector", "forerun.runahead.vllm", "RunaheadConnector")
