"""The client, and the command line of a server, where no server is needed."""

import argparse

import httpx
import pytest

from megatron_fp16rl.rollout import serve
from megatron_fp16rl.rollout.client import Client, ServerLost
from megatron_fp16rl.rollout.discovery import Endpoint
from megatron_fp16rl.rollout.server import _flags


def test_a_key_may_begin_with_a_dash():
    parser = argparse.ArgumentParser()  # as SGLang's
    parser.add_argument("--api-key")
    parser.add_argument("--admin-api-key")
    keys = {"api": "-k3y", "admin": "--other"}
    parsed = parser.parse_args(serve.key_arguments(keys))
    assert (parsed.api_key, parsed.admin_api_key) == ("-k3y", "--other")


def test_an_answer_that_is_no_servers_is_a_lost_server():
    lost = Client(Endpoint("http://127.0.0.1:1", "", ""), 1)
    page = httpx.MockTransport(lambda request: httpx.Response(200, text="<html>Sign in</html>"))
    lost._http = httpx.Client(base_url=lost.url, transport=page)
    with pytest.raises(ServerLost, match="/generate answered no JSON: '<html>Sign in"):
        lost.score([[2, 3]])


def test_options_pass_through_as_flags():
    assert _flags({"context_length": 4096, "log_requests": True, "enable_metrics": False}) == [
        "--context-length=4096",
        "--log-requests",
    ]
