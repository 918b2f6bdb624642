"""A W&B server on this machine: what the real command line and library ask of one, answered from memory.

It knows the operations that wandb 0.31 sends for a sweep, its agents, their runs and artifacts; `unknown`
lists what else came. A sweep is a grid whose points are dealt in order. Nothing is checked of keys, users or
projects.
"""

import json
import re
import threading
from collections import defaultdict
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path
from typing import Any

import yaml

ENTITY, PROJECT = "someone", "visprompt"
_KEY = "local-" + 40 * "0"
_NOWHERE = "http://127.0.0.1:9"  # a proxy that refuses: nothing leaves this machine
_PROJECT_NODE = {"id": "p", "name": PROJECT, "entity": {"id": "e", "name": ENTITY}}


@dataclass
class ServedRun:
    """What the server holds of a run.

    Its config by flat field, the rows of its history, its last summary, its end.
    """

    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    sweep: str | None = None
    display_name: str = ""
    exit_code: int | None = None


@dataclass
class ServedSweep:
    """A registered sweep: its config, and the points that no agent has been given yet."""

    config: dict[str, Any]
    left: list[dict[str, Any]]
    agents: int = 0


@dataclass
class ServedArtifact:
    """An artifact: type and name as created, its files' contents by name, and whether it was committed."""

    type: str
    name: str
    manifest: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    committed: bool = False


def grid(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All points of a sweep's config, the last parameter running fastest."""
    parameters = config["parameters"]
    values = [one["values"] if "values" in one else [one["value"]] for one in parameters.values()]
    return [dict(zip(parameters, point, strict=True)) for point in product(*values)]


class WandbServer:
    """The state of the server, and an answer for each operation by its name."""

    def __init__(self) -> None:
        self.sweeps: dict[str, ServedSweep] = {}
        self.runs: dict[str, ServedRun] = defaultdict(ServedRun)
        self.artifacts: dict[str, ServedArtifact] = {}
        self.unknown: list[str] = []
        self.url = ""
        self._lock = threading.Lock()

    def env(self, folder: Path) -> dict[str, str]:
        """Environment of a process that talks to this server alone and leaves its own files in a folder."""
        places = {f"WANDB_{name}_DIR": str(folder / name.lower()) for name in ("CONFIG", "CACHE", "DATA")}
        access = {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": _KEY, "WANDB_MODE": "online"}
        closed = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), _NOWHERE)
        closed |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "WANDB_ERROR_REPORTING": "false"}
        return access | closed | places | {"WANDB_DIR": str(folder), "NETRC": str(folder / "netrc")}

    def graphql(self, query: str, given: dict[str, Any]) -> dict[str, Any]:
        """The data that answers a query."""
        found = re.search(r"(?:query|mutation)\s+(\w+)", query)
        operation = found[1] if found else query
        answer = getattr(self, f"_on_{operation.lower()}", None)
        if answer is None:
            self.unknown.append(operation)
            return {}
        with self._lock:
            return dict(answer(given))

    def file_stream(self, run: str, sent: Mapping[str, Any]) -> dict[str, Any]:
        """Takes lines of a run's history and summary, and that it ended."""
        with self._lock:
            held = self.runs[run]
            files = sent.get("files") or {}
            held.history += [
                json.loads(line) for line in files.get("wandb-history.jsonl", {}).get("content", [])
            ]
            for line in files.get("wandb-summary.json", {}).get("content", []):
                held.summary = json.loads(line)
            if sent.get("complete"):
                held.exit_code = sent.get("exitcode")
        return {}

    def put(self, path: str, body: bytes) -> None:
        """Takes a file: of an artifact, its manifest, or of a run (not kept)."""
        kind, _, rest = path.lstrip("/").partition("/")
        if kind == "artifact":
            artifact, _, name = rest.partition("/")
            self.artifacts[artifact].files[name] = body
        elif kind == "manifest":
            self.artifacts[rest].manifest = json.loads(body)

    def _on_viewer(self, _: Any) -> Any:
        who = {
            "id": "u",
            "entity": ENTITY,
            "username": ENTITY,
            "email": "",
            "flags": "{}",
            "teams": {"edges": []},
        }
        return {"viewer": who}

    def _on_serverfeaturesquery(self, _: Any) -> Any:
        return {"serverInfo": {"features": []}}

    def _on_upsertsweep(self, given: Any) -> Any:
        name = f"sweep{len(self.sweeps)}"
        config = yaml.safe_load(given["config"])
        self.sweeps[name] = ServedSweep(config, grid(config))
        return {
            "upsertSweep": {"sweep": {"name": name, "project": _PROJECT_NODE}, "configValidationWarnings": []}
        }

    def _on_sweepwithruns(self, given: Any) -> Any:
        sweep = self.sweeps[given["sweep"]]
        node = {"id": given["sweep"], "name": given["sweep"], "method": "grid", "state": "RUNNING"}
        return {"project": {"sweep": node | {"config": yaml.safe_dump(sweep.config), "runs": {"edges": []}}}}

    def _on_createagent(self, given: Any) -> Any:
        self.sweeps[given["sweep"]].agents += 1
        return {"createAgent": {"agent": {"id": given["sweep"]}}}

    def _on_heartbeat(self, given: Any) -> Any:
        sweep = self.sweeps[given["id"]]
        commands: list[dict[str, Any]] = []
        if not json.loads(given["runState"]):  # one run at a time
            commands = [self._command(given["id"], sweep)] if sweep.left else [{"type": "exit"}]
        return {"agentHeartbeat": {"agent": {"id": given["id"]}, "commands": json.dumps(commands)}}

    def _command(self, name: str, sweep: ServedSweep) -> dict[str, Any]:
        number = len(grid(sweep.config)) - len(sweep.left)
        values = {key: {"value": value} for key, value in sweep.left.pop(0).items()}
        return {
            "type": "run",
            "run_id": f"{name}-{sweep.agents}-{number}",
            "program": sweep.config["program"],
            "args": values,
        }

    def _on_runresumestatus(self, given: Any) -> Any:
        node = {"id": "p", "name": PROJECT, "entity": _PROJECT_NODE["entity"], "bucket": None}
        if given["name"] in self.runs:
            run = self.runs[given["name"]]
            tail = json.dumps([json.dumps(row) for row in run.history[-1:]])
            node["bucket"] = {
                **{"id": given["name"], "name": given["name"], "displayName": run.display_name},
                **{"summaryMetrics": json.dumps(run.summary), "historyTail": tail, "eventsTail": "[]"},
                **{"historyLineCount": len(run.history), "logLineCount": 0, "eventsLineCount": 0},
                **{"config": json.dumps({k: {"value": v} for k, v in run.config.items()})},
                **{"tags": [], "notes": "", "wandbConfig": '{"t": 1}'},
            }
        return {"model": node}

    def _on_upsertbucket(self, given: Any) -> Any:
        inserted = given["name"] not in self.runs
        run = self.runs[given["name"]]
        if given.get("config"):
            run.config |= {key: one["value"] for key, one in json.loads(given["config"]).items()}
        run.sweep, run.display_name = (
            given.get("sweep") or run.sweep,
            given.get("displayName") or run.display_name,
        )
        node = {"id": given["name"], "name": given["name"], "displayName": run.display_name, "config": "{}"}
        node |= {"sweepName": run.sweep, "project": _PROJECT_NODE, "historyLineCount": len(run.history)}
        return {"upsertBucket": {"bucket": node, "inserted": inserted}}

    def _on_createrunfiles(self, given: Any) -> Any:
        files = [{"name": name, "uploadUrl": f"{self.url}/run/{name}"} for name in given["files"]]
        return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}

    def _on_markrunfilesuploaded(self, _: Any) -> Any:
        return {"markRunFilesUploaded": {"success": True}}

    def _on_organizationcoreweaveorganizationid(self, _: Any) -> Any:
        return {"entity": None}

    def _on_artifacttype(self, _: Any) -> Any:
        return {"project": {"artifact": None}}

    def _on_createartifact(self, given: Any) -> Any:
        wanted, name = given["input"], f"artifact{len(self.artifacts)}"
        self.artifacts[name] = ServedArtifact(wanted["artifactTypeName"], wanted["artifactCollectionName"])
        node = {"id": name, "state": "PENDING", "artifactSequence": {"latestArtifact": None}}
        return {"createArtifact": {"artifact": node}}

    def _on_createartifactmanifest(self, given: Any) -> Any:
        file = {"id": "m", "uploadUrl": f"{self.url}/manifest/{given['artifactID']}", "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": given["artifactID"], "file": file}}}

    def _on_updateartifactmanifest(self, given: Any) -> Any:
        name = given["artifactManifestID"]
        file = {"id": "m", "uploadUrl": f"{self.url}/manifest/{name}", "uploadHeaders": []}
        return {"updateArtifactManifest": {"artifactManifest": {"id": name, "file": file}}}

    def _on_createartifactfiles(self, given: Any) -> Any:
        edges = []
        for wanted in given["input"]["artifactFiles"]:
            name, path = wanted["artifactID"], wanted["name"]
            url = f"{self.url}/artifact/{name}/{path}"
            node = {"storagePath": path, "uploadUrl": url, "uploadHeaders": [], "uploadMultipartUrls": None}
            edges.append({"node": node | {"artifact": {"id": name}}})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _on_commitartifact(self, given: Any) -> Any:
        self.artifacts[given["artifactID"]].committed = True
        return {"commitArtifact": {"artifact": {"id": given["artifactID"], "digest": "0"}}}


@contextmanager
def serving():
    """Serves on a free port of 127.0.0.1 until the block ends."""
    state = WandbServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = self._body()
            if self.path.startswith("/sdk/otel/"):  # counts of its own use
                self._answer({})
                return
            sent = json.loads(body or b"{}")
            if self.path == "/graphql":
                self._answer({"data": state.graphql(sent["query"], sent.get("variables") or {})})
            elif found := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
                self._answer(state.file_stream(found[1], sent))
            else:
                state.unknown.append(f"POST {self.path}")
                self._answer({}, 404)

        def do_PUT(self):
            state.put(self.path, self._body())
            self._answer({})

        def do_GET(self):
            state.unknown.append(f"GET {self.path}")
            self._answer({}, 404)

        def _body(self):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def _answer(self, answer, status=200):
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_):  # clients end without closing their connections
            pass

    server = Server(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
