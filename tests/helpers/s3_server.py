"""An S3 server on this machine (moto's) with one bucket, for tests of results on object storage."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

BUCKET = "results"
URL = f"s3://{BUCKET}/team"


@contextmanager
def served() -> Iterator[str]:
    """Serves an empty bucket while the body runs; this process and those that it starts find it."""
    from moto.s3.models import s3_backends
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    from visprompt.runs import object_store

    class Quiet(WSGIRequestHandler):
        def log(self, *_: Any) -> None:
            pass

    app, one_at_a_time = DomainDispatcherApplication(create_backend_app), threading.Lock()

    def atomic(environ: dict[str, Any], start_response: Any) -> Any:
        # moto checks a condition and writes in two steps, S3 in one
        with one_at_a_time:
            return app(environ, start_response)

    s3_backends.reset()  # what an earlier server of this process kept
    server = make_server("127.0.0.1", 0, atomic, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    settings = {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    try:
        with patch.dict(os.environ, settings):
            object_store._file_system.cache_clear()
            object_store._file_system(os.getpid()).call_s3("create_bucket", Bucket=BUCKET)
            yield address
    finally:
        object_store._file_system.cache_clear()
        server.shutdown()
        thread.join()
        server.server_close()
