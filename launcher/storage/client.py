"""boto3's client for a store, as settings, environment and profile have it, and the connections it uses."""

import os
import ssl
from urllib.parse import urlsplit

import boto3
import botocore.session
from botocore.config import Config
from botocore.httpsession import get_cert_path
from botocore.utils import get_environ_proxies

from launcher.errors import StoreError
from launcher.storage import credentials
from launcher.storage.base import StoreSettings
from launcher.storage.connections import CONNECT_WITHIN, SILENCE, Connections
from launcher.storage.wire import Boto, Wire, route, signed


class Access:
    """To all buckets of one account at one endpoint. The client tries once: answers.py tries again."""

    def __init__(self, settings: StoreSettings) -> None:
        core = botocore.session.Session(profile=settings.profile)
        credentials.follow(core)
        # Left out, each is as environment and profile have it; and a store that is not AWS has path style.
        style = {True: {"addressing_style": "path"}, False: {"addressing_style": "virtual"}, None: None}
        config = Config(
            retries={"mode": "standard", "total_max_attempts": 1},
            connect_timeout=CONNECT_WITHIN,
            read_timeout=SILENCE,
            max_pool_connections=32,
            signature_version="s3v4",
            s3=style[settings.path_style],
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        ca_bundle = settings.ca_bundle or core.get_config_variable("ca_bundle")
        ca_bundle = ca_bundle or os.environ.get("REQUESTS_CA_BUNDLE")
        session = boto3.session.Session(botocore_session=core, region_name=settings.region)
        self.client = session.client("s3", endpoint_url=settings.endpoint, verify=ca_bundle, config=config)
        self.url: str = self.client.meta.endpoint_url
        self.where = urlsplit(self.url).netloc.rpartition("@")[2]
        self.connections = Connections(_context(ca_bundle) if self.url.startswith("https:") else None)
        self._credentials = core.get_credentials
        self._proxied = bool(get_environ_proxies(self.url))
        if not self._proxied:
            route(self.client, self.connections)

    def wire(self, bucket: str) -> Wire:
        """How bodies travel to `bucket`. Raises botocore's errors: credentials are looked for."""
        quick = None if self._proxied else signed(self.client, bucket, self._credentials(), self.connections)
        return quick or Boto(self.client, bucket)


def _context(ca_bundle: str | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_bundle or get_cert_path(True))
    except OSError as error:
        why = f"the file of certificates {ca_bundle} cannot be used: {error.strerror or error}"
        raise StoreError(why, "correct storage.ca_bundle or AWS_CA_BUNDLE") from error
