"""`coral-spec chat`: a conversation that keeps its cache."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from coral_spec.commands import options


def run(
    model: options.Model = "smollm2-135m",
    draft: options.Draft = "auto",
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_new_tokens: options.MaxNewTokens = 512,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    seed: options.Seed = 0,
    tree: options.Tree = "auto",
    head: options.Head = "auto",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
) -> None:
    """Talk with an instruct model; an empty line or the end of input leaves."""
    import coral_spec
    from coral_spec.answer import Limits, Request
    from expkit.errors import UsageError

    limits = Limits(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    Request(**limits)
    shape = options.parse_tree(tree)
    loaded = coral_spec.load(model, draft=draft, device=device, dtype=dtype, tree=shape, head=options.parse_head(head))
    conversation = loaded.chat(system)
    while text := _ask():
        with options.interruptible() as pressed:
            limits["should_stop"] = pressed
            try:
                turn = conversation.stream(text, **limits)
            except UsageError as error:  # too long for the context, say: the conversation goes on without it
                typer.echo(f"error: {error}", err=True)
                continue
            for piece in turn:
                sys.stdout.write(piece)
                sys.stdout.flush()
        typer.echo()
        typer.echo(options.summary(turn.result()), err=True)


def _ask() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""
