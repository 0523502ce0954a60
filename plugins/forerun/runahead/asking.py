"""What a client asks for, as far as it decides which engines are asked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["CHAT", "COMPLETIONS", "Ask", "read_ask"]

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
_ADDED = {COMPLETIONS: 8, CHAT: 512}  # tokens beyond what is in the request: special ones; those of a chat's template


@dataclass(frozen=True)
class Ask:
    """A request for a completion.

    Args:
        body: As it came; none if it is not a JSON object.
        alone: Why one engine has to answer it; None: a chain could.
        tokens: Of the prompt, where it came as tokens.
        content: Of the prompt, or of all that becomes the prompt; it has a byte or more for each token.
        tokenize: What an engine's `/tokenize` is asked for the same tokens as this request's.
        root: What prompts with common prefixes must have in common besides.
        path: That it was asked by.
    """

    body: Mapping[str, Any] | None = None
    alone: str | None = "body"
    tokens: tuple[int, ...] | None = None
    content: bytes = b""
    tokenize: Mapping[str, Any] | None = None
    root: str = ""
    path: str = COMPLETIONS

    @property
    def longest(self) -> int:
        """The prompt has no more tokens."""
        return len(self.tokens) if self.tokens is not None else len(self.content) + _ADDED[self.path]


def read_ask(path: str, raw: bytes) -> Ask:
    """Reads the body of a request to `COMPLETIONS` or `CHAT`; what an engine would refuse is left to it."""
    try:
        body = json.loads(raw)
    except ValueError:
        return Ask()
    if not isinstance(body, dict):
        return Ask()
    root = json.dumps([body.get("model"), body.get("cache_salt")])
    alone = _alone(body)
    if path == CHAT:
        messages = body.get("messages")
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            return Ask(body, "body", root=root)
        content = json.dumps([body.get(name) for name in ("tools", "documents", "messages")], ensure_ascii=False)
        if any(not _is_text(message.get("content")) for message in messages):
            alone = alone or "multimodal"
        return Ask(body, alone, None, content.encode(errors="replace"), _chat(body), root, path)
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        wanted = {name: body[name] for name in ("model", "add_special_tokens") if name in body}
        return Ask(body, alone, None, prompt.encode(errors="replace"), {**wanted, "prompt": prompt}, root)
    if isinstance(prompt, list) and prompt and all(type(token) is int and 0 <= token < 1 << 31 for token in prompt):
        return Ask(body, alone, tuple(prompt), root=root)
    return Ask(body, "batch" if isinstance(prompt, list) else "body", root=root)


def _alone(body: Mapping[str, Any]) -> str | None:
    """Why one engine has to answer, the prompt aside."""
    for name in ("echo", "prompt_embeds", "use_beam_search", "truncate_prompt_tokens", "kv_transfer_params", "suffix"):
        if body.get(name):
            return name
    if body.get("prompt_logprobs") is not None:
        return "prompt_logprobs"
    if any(body.get(name) not in (None, 1) for name in ("n", "best_of")):
        return "n"
    return None


def _is_text(content: Any) -> bool:
    if content is None or isinstance(content, str):
        return True
    return isinstance(content, list) and all(
        isinstance(part, str) or (isinstance(part, dict) and part.get("type") == "text") for part in content
    )


def _chat(body: Mapping[str, Any]) -> dict[str, Any]:
    """The chat as `/tokenize` takes it, which has no names of its own for some of what a template sees."""
    names = ("model", "messages", "tools", "add_generation_prompt", "continue_final_message", "add_special_tokens")
    wanted = {name: body[name] for name in (*names, "chat_template") if name in body}
    seen = {name: body[name] for name in ("documents", "reasoning_effort") if body.get(name) is not None}
    if "reasoning_effort" in seen:
        seen["enable_thinking"] = seen["reasoning_effort"] != "none"
    kwargs = {**seen, **(body.get("chat_template_kwargs") or {})}
    return {**wanted, "chat_template_kwargs": kwargs} if kwargs else wanted
