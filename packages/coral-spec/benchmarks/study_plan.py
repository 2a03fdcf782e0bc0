"""What the study of CORAL does: commands, what each leaves, and the leases they are cut into. `study.py` runs them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
MODELS = {"smollm2": "smollm2-135m", "gemma3": "gemma3-270m"}
RECIPES = {"eagle2": "eagle2", "hass": "hass", "csra": "coral"}  # name -> preset; CORAL is csra with a router
# name -> preset, weight of the alignment, seeds
SETTINGS = {"aligned": ("eagle2", 3.0, 1), "weight1": ("coral", 1.0, 3), "weight03": ("coral", 0.3, 1)}
WEIGHT = {"smollm2": 3.0, "gemma3": 1.0}  # of the alignment: short trainings chose 3, a full one (one seed) 1
LABELS = {"coral": "csra+router"}  # where the name of a run is that of a method of the benchmark
SETS = ("--tasks", "mt_bench,humaneval,gsm8k")
SEEDS = 3
TEMPERATURES = {"t00": 0.0, "t08": 0.8, "t10": 1.0}
ANSWERS = {"smollm2": ("t00", "t08"), "gemma3": ("t08", "t10")}  # what drafters learn from
OWN, OWN_PROMPTS = "own", 14_000  # answers to prompts that the target writes: the others hold little conversation
STEPS = {"smollm2": 6_000, "gemma3": 5_000}  # of the recipes; Gemma's in one lease of two GPUs
LONG = 14_000  # steps of the bundled drafter
# What drafters and heads are compared on: greedily in fp32 they meet the same answers. Gemma is a base model, whose
# greedy answers soon repeat themselves, so it samples.
GREEDY = ("--dtype", "fp32")
TERMS = {"smollm2": GREEDY, "gemma3": ("--temperature", "1")}

# what the sweeps try; CSRA: anchor, weight, temperature, in the order in which one line led to the next; 0 is HASS
CSRA = [
    *(("first", *each) for each in itertools.product((0.1, 0.03, 0.3), (0.07, 0.2))),
    *((anchor, weight, 0.07) for anchor in ("previous", "target") for weight in (0.1, 0.3)),
    ("first", 0.0, 0.07),
    *(("target", weight, 0.07) for weight in (1.0, 3.0)),
    *(("target", 0.3, temperature) for temperature in (0.03, 0.2)),
    ("target", 1.0, 0.2),
    ("previous", 1.0, 0.07),
    ("target", 10.0, 0.07),
    *(("target", weight, 0.03) for weight in (3.0, 10.0)),
]
# routers: what the sweep starts from comes first; then what it chose, which the preset has
GROUPINGS, GROUPS, ALWAYS = ("kmeans", "contiguous", "cooccurrence"), (64, 128, 32), (1, 0, 4)
CHOSEN_GROUPS, CHOSEN_ALWAYS = 128, 4
SHARES = (0.0625, 0.125, 0.1875, 0.25)  # of the head's rows
LOW_RANK_SHARES = (0.125, 0.25)
CPU_HEADS = ("full", "routed", "frequency")
ROWS = {"smollm2": 49_152, "gemma3": 262_144}
WIDTH = {"smollm2": 576, "gemma3": 640}


@dataclass(frozen=True)
class Step:
    """Commands, and the files that they leave.

    Attributes:
        minutes: estimated, for all commands together.
        commands: arguments of `coral-spec` by what each leaves, a path below WORK.
        keep: folders that later leases need, by their path below WORK/keep.
    """

    minutes: float
    commands: dict[str, list[str]]
    keep: dict[str, str]


class Plan:
    """The leases of a study in a folder.

    Args:
        work: the folder.
        prompts: of the answers.
        gpus: over which commands of a step are spread.
    """

    def __init__(self, work: Path, prompts: Path | None, gpus: Sequence[str] = ("0",)) -> None:
        self.work, self.prompts, self.gpus = work, prompts, gpus

    def leases(self) -> dict[str, list[Step]]:
        """Steps by lease, in the order of the plan."""
        found: dict[str, list[Step]] = {}
        for family in MODELS:
            answers = {out: each for name in ANSWERS[family] for out, each in self.answers(family, name).items()}
            found[f"{family}-data"] = self.batches(answers, 4)
            if family == "smollm2":
                found[f"{family}-sweep"] = self.csra_sweep(family)
            for seed in range(SEEDS if family == "smollm2" else 1):
                found[f"{family}-seed{seed}"] = [self.recipes(family, seed), self.acceptance(family, seed)]
            if family == "smollm2":
                found[f"{family}-settings"] = self.settings(family)
            found[f"{family}-router"] = [*self.router_sweep(family), self.active_groups(family)]
            found[f"{family}-heads"] = [
                self.heads(family),
                self.equal_heads(family),
                self.sampled(family),
                *self.speed(family),
            ]
            if family == "smollm2":
                found[f"{family}-bundled"] = self.bundled(family)
        found["cpu"] = self.cpu()
        return found

    def path(self, *parts: str) -> str:
        return str(self.work.joinpath(*parts))

    def answers(self, family: str, name: str) -> dict[str, list[str]]:
        """One sample of every prompt at one temperature."""
        out = f"keep/answers/{family}-{name}"
        options = ["data", "--model", MODELS[family], "--out", self.path(out)]
        if name == OWN:
            options += ["--self-prompts", str(OWN_PROMPTS), "--temperature", "0.7", "--seed", "2"]
        else:
            options += ["--prompts", str(self.prompts or "PROMPTS")]
            options += ["--temperature", str(TEMPERATURES[name]), "--seed", str(list(TEMPERATURES).index(name))]
        options += ["--max-new-tokens", "400", "--batch-size", "4096", "--cache-gib", "40", "--shard-size", "8192"]
        return {f"{out}/complete": options}

    def training(
        self, family: str, name: str, preset: str, seed: int, *settings: str, answers: Sequence[str] = ()
    ) -> dict[str, list[str]]:
        """A training by what it leaves."""
        options = ["train", "--config", str(CONFIGS / f"{preset}.toml"), "--model", MODELS[family], "--name", name]
        options += ["--runs", self.path("runs"), "--seed", str(seed), "--set", "evaluation.every=500"]
        options += ["--set", f"loss.chunk={8192 if family == 'smollm2' else 2048}"]
        for each in answers or ANSWERS[family]:
            options += ["--data", self.path("keep/answers", f"{family}-{each}")]
        return {f"runs/{name}/result.json": [*options, *settings]}

    def recipes(self, family: str, seed: int) -> Step:
        """The three recipes with equal steps."""
        names = {recipe: f"{family}-{recipe}-{seed}" for recipe in RECIPES}
        commands = {}
        for recipe, name in names.items():
            weight = ["--set", f"csra.weight={WEIGHT[family]}"] if recipe == "csra" else []
            steps = ["--stages", "drafter", "--steps", str(STEPS[family])]
            commands |= self.training(family, name, RECIPES[recipe], seed, *steps, *weight)
        keep = {f"runs/{name}/drafter": f"drafters/{name}" for name in names.values()} if seed == 0 else {}
        return Step(16 if family == "smollm2" else 27, commands, keep)

    def drafters(self, family: str, seed: int, recipes: Sequence[str] = tuple(RECIPES)) -> list[str]:
        """Options that name drafters, as they lie in this lease or in what earlier ones have kept."""
        options = []
        for recipe in recipes:
            name = f"{family}-{recipe}-{seed}"
            fresh = self.work / "runs" / name / "drafter"
            folder = fresh if fresh.is_dir() else self.work / "keep/drafters" / name
            options += ["--draft", f"{LABELS.get(recipe, recipe)}={folder}"]
        return options

    def evaluation(self, family: str, name: str, *options: str, limit: int = 40) -> dict[str, list[str]]:
        """Acceptance by four processes, by what it leaves."""
        out = f"results/{family}-{name}.json"
        common = ["eval", "--model", MODELS[family], *SETS, "--limit", str(limit), "--workers", "4"]
        return {out: [*common, "--json", self.path(out), "--plot", self.path(out[:-5] + ".png"), *options]}

    def acceptance(self, family: str, seed: int) -> Step:
        """All recipes with the full head: tau and acceptance per depth."""
        options = [*self.drafters(family, seed), "--head", "full"]
        greedy = self.evaluation(family, f"recipes-seed{seed}-t0", *options, *GREEDY)
        if family == "smollm2":
            return Step(3, greedy, {})
        return Step(5, {**self.evaluation(family, f"recipes-seed{seed}-t1", *options, *TERMS[family]), **greedy}, {})

    def settings(self, family: str) -> list[Step]:
        """CSRA's best weights at full length, and its alignment to the target with EAGLE-2's one step."""
        commands, evaluations, keep = {}, {}, {}
        for recipe, (preset, weight, seeds) in SETTINGS.items():
            settings = {"weight": weight, "anchor": "target", "temperature": 0.07}
            flags = [part for key, value in settings.items() for part in ("--set", f"csra.{key}={value}")]
            for seed in range(seeds):
                name = f"{family}-{recipe}-{seed}"
                commands |= self.training(family, name, preset, seed, "--stages", "drafter", *flags)
                keep[f"runs/{name}/drafter"] = f"drafters/{name}"
                if preset == "coral":
                    options = [*self.drafters(family, seed, (recipe,)), "--head", "full", *TERMS[family]]
                    evaluations |= self.evaluation(family, f"{recipe}-seed{seed}-t0", *options)
        return [*self.batches(commands, 6, keep), *self.batches(evaluations, 1)]

    def bundled(self, family: str) -> list[Step]:
        """The drafter and router that the package has: more answers, more steps."""
        name = f"{family}-bundled-0"
        stages = ["--stages", "drafter,router", "--steps", str(LONG), "--set", "evaluation.every=2000"]
        made = self.training(family, name, "coral", 0, *stages, answers=(*ANSWERS[family], OWN))
        keep = {f"runs/{name}/drafter": f"drafters/{name}"}
        options = [*self.drafters(family, 0, ("csra", "bundled")), "--head", "full", "--head", "16384", *TERMS[family]]
        routed = [*self.drafters(family, 0, ("bundled",)), "--head", "routed", *TERMS[family]]
        return [
            *self.batches(self.answers(family, OWN), 6),
            Step(16, {f"runs/{name}/router/result.json": next(iter(made.values()))}, keep),
            Step(2, self.evaluation(family, "bundled-t0", *options), {}),
            Step(1, self.evaluation(family, "bundled-routed-t0", *routed), {}),
        ]

    def sampled(self, family: str) -> Step:
        """EAGLE-2, where its acceptance was measured greedily only, and CORAL at temperature 1."""
        options = [*self.drafters(family, 0, ("eagle2",)), "--head", "full", "--temperature", "1"]
        routed = [*self.drafters(family, 0, ("coral",)), "--head", "routed", "--temperature", "1"]
        evaluations = self.evaluation(family, "eagle2-t1", *options) if family == "smollm2" else {}
        return Step(2, {**evaluations, **self.evaluation(family, "coral-t1", *routed)}, {})

    def csra_sweep(self, family: str) -> list[Step]:
        """One setting changed at a time, and weight with temperature; HASS beside them."""
        settings = ("stop_gradient=false", "anchor=first", "weight=0.1", "temperature=0.07")
        open_gradient = [part for each in settings for part in ("--set", f"csra.{each}")]
        short = ["--stages", "drafter", "--steps", "1500"]
        commands = self.training(family, f"{family}-sweep-first-open", "coral", 0, *short, *open_gradient)
        for anchor, weight, temperature in CSRA:
            name = f"{family}-sweep-{anchor}-{weight:g}-{temperature:g}"
            settings = [f"csra.anchor={anchor}", f"csra.weight={weight}", f"csra.temperature={temperature}"]
            flags = [part for each in settings for part in ("--set", each)]
            commands |= self.training(family, name, "coral", 0, *short, *flags)
        return self.batches(commands, 1)

    def router_sweep(self, family: str) -> list[Step]:
        """Grouping, number of groups, and how many are always read, one changed at a time."""
        tried = [(grouping, GROUPS[0], ALWAYS[0]) for grouping in GROUPINGS]
        tried += [(GROUPINGS[0], groups, ALWAYS[0]) for groups in GROUPS]
        tried += [(GROUPINGS[0], GROUPS[0], always) for always in ALWAYS]
        commands: dict[str, list[str]] = {}
        for grouping, groups, always in dict.fromkeys(tried):
            name = f"{family}-router-{grouping}-{groups}-{always}"
            active = max(1, round(groups * SHARES[2]) - always)
            settings = {"grouping": grouping, "groups": groups, "always": always, "active": active, "steps": 600}
            flags = [part for key, value in settings.items() for part in ("--set", f"router.{key}={value}")]
            made = self.training(family, name, "coral", 0, *self.on_the_drafter(family, "router"), *flags)
            commands[f"runs/{name}/router/result.json"] = next(iter(made.values()))
        keep = {f"runs/{family}-router-{GROUPINGS[0]}-{GROUPS[0]}-{ALWAYS[0]}/drafter": f"drafters/{family}-trial-0"}
        steps = self.batches(commands, 1)
        return [*steps[:-1], Step(steps[-1].minutes, steps[-1].commands, keep)]

    def on_the_drafter(self, family: str, stage: str) -> list[str]:
        return ["--stages", stage, "--drafter", self.path("keep/drafters", f"{family}-csra-0")]

    def active_groups(self, family: str) -> Step:
        """tau by active groups and score scale, on fewer prompts."""
        options = [*self.drafters(family, 0, ("trial",)), *TERMS[family]]
        for share, scores in itertools.product(SHARES, ("renormalised", "hierarchical")):
            options += ["--head", f"routed:{round(GROUPS[0] * share) - ALWAYS[0]},{scores}"]
        return Step(6, self.evaluation(family, "active-groups", *options, limit=10), {})

    def heads(self, family: str) -> Step:
        """The chosen router and low-rank heads, each trained in full on the CSRA drafter of seed 0."""
        commands, keep = {}, {}
        for stage, ranks in (("router", [0]), ("low-rank", [self.rank(family, share) for share in LOW_RANK_SHARES])):
            for rank in ranks:
                name = f"{family}-{f'lowrank{rank}' if rank else 'coral'}-0"
                flags = ["--set", f"low_rank.rank={rank}"] if rank else []
                made = self.training(family, name, "coral", 0, *self.on_the_drafter(family, stage), *flags)
                commands[f"runs/{name}/{stage}/result.json"] = next(iter(made.values()))
                keep[f"runs/{name}/drafter"] = f"drafters/{name}"
        return Step(4, commands, keep)

    def rows(self, family: str, share: float) -> int:
        """Head rows with as many weights as a router that reads this share, and what it reads."""
        return round(ROWS[family] * share) + WIDTH[family] + CHOSEN_GROUPS + 2

    def rank(self, family: str, share: float) -> int:
        """Of a low-rank head with as many weights."""
        return round(self.rows(family, share) * WIDTH[family] / (ROWS[family] + WIDTH[family]))

    def equal_heads(self, family: str) -> Step:
        """All heads at equal drafter and tree, and with equal weights, those of the router counted."""
        limit = 20 if family == "smollm2" else 40
        options = [*self.drafters(family, 0, ("coral",)), "--head", "full"]
        for share in SHARES:
            options += ["--head", f"routed:{round(CHOSEN_GROUPS * share) - CHOSEN_ALWAYS}"]
            options += ["--head", str(self.rows(family, share))]
        commands = self.evaluation(family, "heads", *options, *TERMS[family], limit=limit)
        for rank in [self.rank(family, share) for share in LOW_RANK_SHARES]:
            low_rank = [*self.drafters(family, 0, (f"lowrank{rank}",)), "--head", "low-rank", *TERMS[family]]
            commands |= self.evaluation(family, f"heads-lowrank{rank}", *low_rank, limit=limit)
        return Step(5, commands, {})

    def speed(self, family: str) -> list[Step]:
        """Speed alone on the machine: full head for all recipes, then the same drafter with the other heads."""
        steps = []
        named = ",".join(each for each in self.drafters(family, 0, ("eagle2", "hass", "csra")) if "=" in each)
        coral = ",".join(each for each in self.drafters(family, 0, ("coral",)) if "=" in each)
        wanted = {"full": f"ar,hf-compiled,hf,{named}", "routed": f"ar,{coral}", "frequency": f"ar,{coral}"}
        for head, methods in wanted.items():
            out = f"results/{family}-speed-{head}.json"
            options = ["bench", "--model", MODELS[family], *SETS, "--limit", "10", "--max-new-tokens", "128"]
            options += ["--methods", methods, "--head", head, "--tree", "6,10,60", "--json", self.path(out)]
            options += [] if family == "smollm2" else TERMS[family]
            steps.append(Step(3, {out: [*options, "--plot", self.path(out[:-5] + ".png")]}, {}))
        return steps

    def cpu(self) -> list[Step]:
        """Gemma on two cores with the drafter in this repository: heads with their own and with equal trees, thrice."""
        steps = []
        for number, temperature, tree, head in itertools.product("123", "01", ("auto", "2,2,3"), CPU_HEADS):
            out = f"results/gemma3-cpu-t{temperature}-{tree.replace(',', '')}-{head}-{number}.json"
            options = ["bench", "--model", MODELS["gemma3"], "--tasks", "sample", "--limit", "4", "--device", "cpu"]
            options += ["--methods", "ar,coral", "--head", head, "--tree", tree, "--max-new-tokens", "96"]
            steps.append(Step(0.6, {out: [*options, "--temperature", temperature, "--json", self.path(out)]}, {}))
        return steps

    def batches(self, commands: dict[str, list[str]], minutes: float, keep: dict[str, str] | None = None) -> list[Step]:
        """Steps of as many commands as there are GPUs; ``minutes`` is that of one command."""
        every = list(commands.items())
        parts = [every[at : at + len(self.gpus)] for at in range(0, len(every), len(self.gpus))]
        return [Step(minutes * len(part), dict(part), keep or {}) for part in parts]
