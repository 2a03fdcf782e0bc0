"""`coral-spec generate`: one answer, streamed, and one line of figures."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from coral_spec.commands import options

if TYPE_CHECKING:
    from coral_spec.answer import Limits
    from coral_spec.model import Model

WARM_UP = 16  # tokens


def run(
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")],
    model: options.Model = "smollm2-135m",
    draft: options.Draft = "auto",
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    seed: options.Seed = 0,
    stop: options.Stop = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end-of-text token.")] = False,
    chat: Annotated[bool, typer.Option(help="Wrap the prompt in the model's chat template.")] = True,
    compare: Annotated[
        bool, typer.Option("--compare", help="Answer without drafting too, and say how it differs.")
    ] = False,
    tree: options.Tree = "auto",
    head: options.Head = "auto",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    json: options.Json = None,
) -> None:
    """Answer a prompt, streaming the text to standard output."""
    import coral_spec
    from coral_spec.answer import Limits, Request
    from expkit.checkpoint import write_json
    from expkit.rundir import evidence

    options.require_file_name("json", json, ".json")
    limits = Limits(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop or (),
        ignore_eos=ignore_eos,
    )
    Request(**limits)  # wrong limits are said before a model loads
    shape = options.parse_tree(tree)
    text = sys.stdin.read() if prompt == "-" else prompt
    loaded = coral_spec.load(model, draft=draft, device=device, dtype=dtype, tree=shape, head=options.parse_head(head))
    with options.interruptible() as pressed:
        limits["should_stop"] = pressed
        if compare:
            _warm_up(loaded, text, chat, limits)
        answer = loaded.generate(text, chat=chat, on_text=_show, **limits)
        typer.echo()
        line = options.summary(answer)
        record = {**evidence(seed), "text": answer.text, "finish_reason": answer.finish_reason}
        record["statistics"] = answer.statistics.to_dict()
        if compare and answer.finish_reason != "interrupted":
            undrafted = loaded.with_draft("none")
            _warm_up(undrafted, text, chat, limits)
            plain = undrafted.generate(text, chat=chat, **limits)
            speedup = answer.statistics.tokens_per_second / plain.statistics.tokens_per_second
            same = answer.token_ids == plain.token_ids
            words = "the same tokens"
            if not same:  # in bf16 two tokens may be as good as equally probable, and rounding turns them
                words = (
                    "other tokens: `coral-spec check` tells ties of rounding from bugs, `--dtype fp32` has hardly any"
                )
            if plain.finish_reason != "interrupted":
                line += f", {speedup:.2f}x plain decoding ({words})"
                record |= {"speedup": speedup, "same_tokens": same, "plain": plain.statistics.to_dict()}
    typer.echo(line, err=True)
    if json is not None:
        write_json(json, record)


def _warm_up(model: Model, text: str, chat: bool, limits: Limits) -> None:
    """Capture on a GPU what an answer needs, so that two are compared by what they take themselves."""
    if model.target.device.type == "cuda":
        short = limits.copy()
        short["max_new_tokens"] = WARM_UP
        model.generate(text, chat=chat, **short)


def _show(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()
