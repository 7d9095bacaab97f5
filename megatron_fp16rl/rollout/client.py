"""HTTP to SGLang servers. Every call has a timeout; every refusal is an error with its reason."""

import base64
import json
from dataclasses import asdict, dataclass
from typing import Any

import aiohttp
import httpx
import numpy as np
import torch

from megatron_fp16rl.data.batch import compact
from megatron_fp16rl.models.spec import Routing
from megatron_fp16rl.rollout.discovery import Endpoint
from megatron_fp16rl.utils.errors import ExplainedError

# An idle connection is closed by SGLang 0.5.23 after 5 s: a request on its way then would be lost.
_KEEP_ALIVE_S = 3


class ServerError(ExplainedError):
    """A server refused, broke off or did not answer in time."""


class ServerLost(ServerError):
    """The server is at fault, not the request: another server may answer it."""


@dataclass(frozen=True)
class Generation:
    """One generated response."""

    ids: list[int]
    logprobs: list[float]  # under the server's policy at the sampling temperature, nats
    text: str  # decoded by the server; what is graded is decoded by tasks.templates
    truncated: bool
    version: str  # of the weights
    experts: torch.Tensor | None = None  # [tokens - 1, layers, top_k] int32; see Batch
    aborted: bool = False  # not at its end: there may be no token yet
    cached: int = 0  # tokens of the prompt that the server did not have to run again


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. temperature 0: the likeliest token each time."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()  # a response ends with the first of these, which it keeps

    def parameters(self) -> dict[str, Any]:
        return {**asdict(self), "stop": list(self.stop), "no_stop_trim": True}


class Client:
    """One server."""

    def __init__(self, endpoint: Endpoint, timeout_s: float) -> None:
        self.endpoint, self.url = endpoint, endpoint.url
        self._headers = {
            False: {"Authorization": f"Bearer {endpoint.api}"},
            True: {"Authorization": f"Bearer {endpoint.admin}"},
        }
        self._http = httpx.Client(
            base_url=endpoint.url,
            timeout=httpx.Timeout(timeout_s, connect=10),
            limits=httpx.Limits(keepalive_expiry=_KEEP_ALIVE_S),
            trust_env=False,  # a site's proxy is for other networks
        )

    def generate(
        self,
        prompts: list[list[int]],
        sampling: Sampling | list[Sampling],
        seeds: list[int] | None = None,
        routing: Routing | None = None,
    ) -> list[Generation]:
        """Samples one response to each prompt (token ids), all in one request.

        sampling: of all, or one for each.
        seeds: one for each; a deterministic server answers equal seeds equally. routing: of the
        model, to get the experts of each token as well.
        """
        samplings = sampling if isinstance(sampling, list) else [sampling] * len(prompts)
        parameters = _parameters(samplings, seeds)
        answers = self.post("/generate", _body(prompts, parameters, routing))
        generations = _generations(prompts, answers, routing)
        if any(generation.aborted for generation in generations):
            raise ServerLost(f"{self.url} broke a response off: it is shutting down")
        return generations

    async def generate_each(
        self,
        session: aiohttp.ClientSession,
        names: list[str],
        prompts: list[list[int]],
        samplings: list[Sampling],
        seeds: list[int] | None = None,
        routing: Routing | None = None,
    ) -> list[Generation]:
        """As `generate`, on an event loop, with a name and a sampling for each prompt.

        Returns when all have ended; those that `abort` ended are returned as far as they are.
        """
        body = {**_body(prompts, _parameters(samplings, seeds), routing), "rid": names}
        answers = self._json("/generate", await self._post_on_loop(session, "/generate", body))
        return _generations(prompts, answers, routing)

    async def abort(self, session: aiohttp.ClientSession, name: str) -> None:
        """Ends a response of `generate_each`; nothing if it has ended, or has not arrived yet."""
        await self._post_on_loop(session, "/abort_request", {"rid": name}, admin=True)

    def score(self, sequences: list[list[int]]) -> list[list[float]]:
        """Log-probs, in nats at temperature 1, of every token but the first of each sequence."""
        return [logprobs for logprobs, _ in self.score_with_experts(sequences, None)]

    def score_with_experts(
        self, sequences: list[list[int]], routing: Routing | None
    ) -> list[tuple[list[float], torch.Tensor | None]]:
        """As `score`, with the experts of every token but the last, as in Generation."""
        answers = self.post(
            "/generate",
            {
                "input_ids": sequences,
                "sampling_params": {"temperature": 1.0, "max_new_tokens": 1},
                "return_logprob": True,
                "logprob_start_len": 0,
                "return_routed_experts": routing is not None,
            },
        )
        scores = []
        for sequence, answer in zip(sequences, answers, strict=True):
            meta = answer["meta_info"]
            # Of every token of the sequence: the one that is generated is not run.
            experts = _experts(meta, len(sequence), routing)[:-1] if routing else None
            scores.append(([lp for lp, *_ in meta["input_token_logprobs"][1:]], experts))
        return scores

    @property
    def responds(self) -> bool:
        """Whether the scheduler answers: /server_info waits for it, and generates nothing."""
        try:
            answer = self._http.get("/server_info", headers=self._headers[True], timeout=5)
        except httpx.TransportError:
            return False
        return answer.status_code == 200

    def wait_until_idle(self, timeout_s: float) -> None:
        """Waits until the scheduler runs nothing, and empties its cache; raises ServerError if it does."""
        self._post(f"/flush_cache?timeout={timeout_s}", {}, True, timeout_s + 10)

    def abort_weight_update(self, group: str, timeout_s: float) -> bool:
        """Ends an interrupted weight update, and leaves its group. Returns whether the server did."""
        bodies: dict[str, dict[str, Any]] = {
            "/end_weight_update": {},
            "/destroy_weights_update_group": {"group_name": group},
        }
        for path, body in bodies.items():
            try:
                self.post(path, body, admin=True, timeout_s=timeout_s)
            except ServerLost:
                return False
            except ServerError:
                pass  # no update had begun, or no group was joined
        return True

    def post(
        self, path: str, body: dict[str, Any], admin: bool = False, timeout_s: float | None = None
    ) -> Any:
        """POSTs JSON; returns the JSON answer. Raises ServerError unless the status is 200."""
        return self._json(path, self._post(path, body, admin, timeout_s))

    def _post(self, path: str, body: dict[str, Any], admin: bool, timeout_s: float | None) -> bytes:
        timeout = self._http.timeout if timeout_s is None else httpx.Timeout(timeout_s, connect=10)
        try:
            response = self._http.post(
                path, json=body, headers=self._headers[admin], timeout=timeout
            )
        except httpx.TransportError as error:
            raise self._lost(path, error) from error
        return self._checked(path, response.status_code, response.content)

    async def _post_on_loop(
        self,
        session: aiohttp.ClientSession,
        path: str,
        body: dict[str, Any],
        admin: bool = False,
    ) -> bytes:
        """As `post`, with the timeout of `session`; returns the answer as it is."""
        try:
            async with session.post(
                self.url + path, json=body, headers=self._headers[admin]
            ) as response:
                content = await response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self._lost(path, error) from error
        return self._checked(path, response.status, content)

    def _lost(self, path: str, error: Exception) -> ServerLost:
        return ServerLost(
            f"{self.url}{path}: {type(error).__name__}: {error or 'connection lost'}; "
            "see logs/ in the run directory for the server's last words"
        )

    def _checked(self, path: str, status: int, content: bytes) -> bytes:
        if status != 200:
            kind, text = (
                ServerLost if status >= 500 else ServerError,
                content.decode(errors="replace"),
            )
            raise kind(f"{self.url}{path} answered {status}: {text[:2000]}")
        return content

    def _json(self, path: str, content: bytes) -> Any:
        try:
            return json.loads(content)
        except ValueError:  # a proxy in between may answer with a page
            text = content[:200].decode(errors="replace")
            raise ServerLost(f"{self.url}{path} answered no JSON: {text!r}") from None


def event_loop_session(timeout_s: float, per_server: int = 0) -> aiohttp.ClientSession:
    """For `generate_each` and `abort`: one for all servers, and for one event loop.

    per_server: connections at once; 0: any number. (httpx takes time that grows with their square.)
    """
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=timeout_s),
        connector=aiohttp.TCPConnector(
            limit=0, limit_per_host=per_server, keepalive_timeout=_KEEP_ALIVE_S
        ),
    )


def _parameters(samplings: list[Sampling], seeds: list[int] | None) -> list[dict[str, Any]]:
    parameters = [sampling.parameters() for sampling in samplings]
    if seeds is not None:
        for one, seed in zip(parameters, seeds, strict=True):
            one["sampling_seed"] = seed
    return parameters


def _body(
    prompts: list[list[int]],
    parameters: list[dict[str, Any]],
    routing: Routing | None,
) -> dict[str, Any]:
    return {
        "input_ids": prompts,
        "sampling_params": parameters,
        "return_logprob": True,
        "return_routed_experts": routing is not None,
    }


def _generations(
    prompts: list[list[int]], answers: list[dict[str, Any]], routing: Routing | None
) -> list[Generation]:
    return [
        _generation(prompt, answer, routing)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def _generation(prompt: list[int], answer: dict[str, Any], routing: Routing | None) -> Generation:
    meta = answer["meta_info"]
    reason, ids = meta["finish_reason"]["type"], answer["output_ids"]
    if reason not in ("stop", "length", "abort"):
        raise ServerError(f"a response ended with {meta['finish_reason']}")
    # Aborted while it waited: without tokens, or (taken back by the scheduler) without their experts.
    if reason == "abort" and (not ids or (routing and "routed_experts" not in meta)):
        return Generation([], [], "", False, meta["weight_version"], aborted=True)
    versions = {part["version"] for part in meta["weight_versions"]}
    if len(versions) != 1:
        raise ServerError(
            f"a response was sampled from several weight versions: {sorted(versions)}"
        )
    return Generation(
        ids=ids,
        logprobs=[entry[0] for entry in meta["output_token_logprobs"]],
        text=answer["text"],
        truncated=reason == "length",
        version=versions.pop(),
        experts=_experts(meta, len(prompt) + len(ids) - 1, routing) if routing else None,
        aborted=reason == "abort",
        cached=meta.get("cached_tokens", 0),
    )


def _experts(meta: dict[str, Any], tokens: int, routing: Routing) -> torch.Tensor:
    """The experts of every token, prompt included, but the last, which the model was not run on."""
    chosen = np.frombuffer(base64.b64decode(meta["routed_experts"]), np.int32)
    shape = (tokens, len(routing.sparse), routing.top_k)
    if chosen.size != np.prod(shape):
        raise ServerError(f"a record of routed experts has {chosen.size} entries, not {shape}")
    chosen = chosen.reshape(shape).copy()
    sparse = np.array(routing.sparse)
    chosen[:, ~sparse] = -1  # SGLang leaves zeros where there is no router
    ordered = np.sort(chosen[:, sparse])
    if ordered.min() < 0 or ordered.max() >= routing.experts or not np.diff(ordered).all():
        raise ServerError(
            f"a record of routed experts is not {routing.top_k} different ones of {routing.experts} "
            "for every token; without router replay (rollout.router_replay: false) it is not needed"
        )
    return compact(torch.from_numpy(chosen), routing.experts)
