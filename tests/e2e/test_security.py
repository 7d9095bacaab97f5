"""What a stranger on the network, or in the process list, can and cannot do. One real server."""

import ast
import importlib.util
import json
import os
import stat
from pathlib import Path

import httpx
import psutil
import pytest

from launch.run_folder import new_run_folder
from megatron_fp16rl.rollout import discovery
from megatron_fp16rl.rollout.discovery import Endpoint

# Of SGLang's routes, those that change weights or memory, stop the scheduler, or unpickle.
DANGEROUS = {
    *("/update_weights_from_disk", "/update_weights_from_tensor", "/update_weights_from_ipc"),
    *("/update_weights_from_distributed", "/init_weights_update_group"),
    *("/destroy_weights_update_group", "/begin_weight_update", "/end_weight_update"),
    *("/update_weight_version", "/get_weights_by_name", "/weights_checker"),
    *("/init_weights_send_group_for_remote_instance", "/send_weights_to_remote_instance"),
    *("/release_memory_occupation", "/resume_memory_occupation", "/flush_cache", "/freeze_gc"),
    *("/load_lora_adapter", "/load_lora_adapter_from_tensors", "/unload_lora_adapter"),
    *("/pause_generation", "/continue_generation", "/abort_request", "/set_internal_state"),
    *("/start_profile", "/stop_profile", "/configure_logging", "/slow_down"),
}
OPEN = {"/health", "/health_generate", "/ready"}  # to probes: they say that it lives


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.endpoint.url, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def tree(server):
    launcher = psutil.Process(server.process.pid)
    return [launcher, *launcher.children(recursive=True)]


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def admin_routes():
    """(method, path) of what SGLang's source says is for the admin."""
    package = importlib.util.find_spec("sglang").submodule_search_locations[0]
    source = ast.parse((Path(package) / "srt/entrypoints/http_server.py").read_text())
    for function in ast.walk(source):
        calls = [d for d in getattr(function, "decorator_list", ()) if isinstance(d, ast.Call)]
        if not any(ast.unparse(call.func) == "auth_level" for call in calls):
            continue
        for call in calls:
            if isinstance(call.func, ast.Attribute) and isinstance(call.args[0], ast.Constant):
                methods = [ast.literal_eval(k.value) for k in call.keywords if k.arg == "methods"]
                for method in methods[0] if methods else [call.func.attr.upper()]:
                    yield method, call.args[0].value


def test_what_changes_a_server_wants_the_admin_key(server, http):
    routes = list(admin_routes())
    assert {path for _, path in routes} >= DANGEROUS
    wrong = (
        {},
        bearer("wrong"),
        bearer(server.endpoint.api),
        {"Authorization": f"Basic {server.endpoint.admin}"},
    )
    for method, path in [*routes, ("GET", "/server_info"), ("GET", "/get_server_info")]:
        for headers in wrong:
            answer = http.request(method, path, headers=headers, json={})
            absent = path.startswith("/dumper")  # a debugging aid that nobody switches on
            assert answer.status_code in ((401, 404) if absent else (401,)), (method, path)
    admin = bearer(server.endpoint.admin)
    assert http.post("/flush_cache", headers=admin).status_code == 200
    assert http.get("/server_info", headers=admin).status_code == 200
    assert http.post("/end_weight_update", headers=admin, json={}).status_code == 400  # none began


def test_everything_else_wants_the_api_key(server, http):
    described = http.get("/openapi.json", headers=bearer(server.endpoint.api)).json()
    unguarded = set()
    for path, methods in described["paths"].items():
        for method in methods:
            for headers in ({}, bearer("wrong")):
                answer = http.request(method, path, headers=headers, json={})
                if answer.status_code != 401:
                    unguarded.add(path)
    assert unguarded == OPEN
    request = {"input_ids": [2, 3], "sampling_params": {"max_new_tokens": 1}}
    assert http.post("/generate", json=request).status_code == 401
    good = http.post("/generate", json=request, headers=bearer(server.endpoint.api))
    assert good.status_code == 200
    for key in (server.endpoint.api, server.endpoint.admin):
        assert key not in json.dumps(described) + good.text


def test_code_in_a_request_is_refused(server, http):
    """SGLang would unpickle it, were it started with --enable-custom-logit-processor."""
    request = {
        "input_ids": [2, 3],
        "sampling_params": {"max_new_tokens": 1},
        "custom_logit_processor": json.dumps({"callable": "80"}),
    }
    answer = http.post("/generate", json=request, headers=bearer(server.endpoint.api))
    assert answer.status_code == 400
    assert "custom logit processor" in answer.text


def test_a_web_socket_is_refused(http):
    """SGLang asks for keys over HTTP only. Here uvicorn has no library for web sockets anyway."""
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
    }
    assert http.get("/v1/realtime", headers=upgrade).status_code >= 400


def test_a_server_listens_on_its_own_address_only(server, tree):
    listening = [
        c.laddr.ip
        for process in tree
        for c in process.net_connections("inet")
        if c.status == psutil.CONN_LISTEN or not c.raddr
    ]
    assert len(listening) > 1  # HTTP, and gloo
    assert set(listening) == {"127.0.0.1"}
    assert server.endpoint.url.startswith("http://127.0.0.1:")


def test_sockets_between_its_processes_are_for_this_user(tree):
    files = {c.laddr for process in tree for c in process.net_connections("unix") if c.laddr}
    assert files
    for file in files:
        folder = Path(file).parent.stat()
        assert (stat.S_IMODE(folder.st_mode), folder.st_uid) == (0o700, os.getuid())


def test_no_process_and_no_log_shows_a_key(server, tree):
    shown = [server.log.read_text(errors="replace")]
    assert "The server is fired up" in shown[0]
    for process in psutil.process_iter():
        try:
            shown += [*process.cmdline(), *process.environ().values()]
        except psutil.Error:
            continue
    for key in (server.endpoint.api, server.endpoint.admin):
        assert len(key) > 40
        assert not any(key in text for text in shown)


def test_run_directories_and_keys_are_for_this_user(server, tmp_path):
    other = Endpoint("http://127.0.0.1:1", "a", "b")
    before = os.umask(0)  # whatever the user's is
    try:
        folder = new_run_folder(tmp_path, "run")
        registry = folder / "private" / "servers"
        discovery.register(registry, 10, other)
        discovery.register(registry, 2, server.endpoint)
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for file in (registry / "2.json", server.log.parent / "server-0.json"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert discovery.registered(registry) == [server.endpoint, other]
    discovery.deregister(registry, 2)
    assert discovery.registered(registry) == [other]
    assert discovery.registered(tmp_path / "absent") == []
