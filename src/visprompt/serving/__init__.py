"""Serve tuned states over HTTP: many tasks on one backbone, in batches that mix them (docs/serving.md).

    request -> app (admission, time limit) -> pictures (decode and preprocess, in threads)
            -> batching (one thread gathers images of all requests) -> Bank -> probabilities -> answer

`native` and `open_inference` are two sets of endpoints on one `Service`; `states` keeps the bank equal to the
files of a folder.
"""

from importlib.util import find_spec

from visprompt.errors import UserError

_MISSING = [
    name
    for name in ("fastapi", "fastapi_offline", "python_multipart", "prometheus_client", "uvicorn")
    if find_spec(name) is None
]
if _MISSING:
    raise UserError(
        f"the service needs packages that are not installed ({', '.join(_MISSING)}): install the extra with "
        "pip install '.[serve]', or all of the project with make setup"
    )
