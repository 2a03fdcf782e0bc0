"""What the study of CORAL does: commands, what each leaves and needs, and the leases they belong to."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
MODELS = {"smollm2": "smollm2-135m", "gemma3": "gemma3-270m"}
RECIPES = {"eagle2": "eagle2", "hass": "hass", "csra": "coral"}  # name -> preset; CORAL is csra with a router
# name -> preset, weight of the alignment, seeds
SETTINGS = {"aligned": ("eagle2", 3.0, 1), "weight1": ("coral", 1.0, 3), "weight03": ("coral", 0.3, 1)}
WEIGHT = {"smollm2": 3.0, "gemma3": 1.0}  # of the recipes' alignment: short trainings chose 3, full ones 1, the preset
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
POOLS = ("pool=sequence", "negatives=512", "negatives=8192")  # of the alignment's negatives; batch, 2,048 is the preset
CPU_HEADS = ("full", "routed", "frequency")
ROWS = {"smollm2": 49_152, "gemma3": 262_144}
WIDTH = {"smollm2": 576, "gemma3": 640}


@dataclass(frozen=True, eq=False)
class Job:
    """One command.

    Attributes:
        lease: the part that it belongs to.
        out: the file that it leaves, a path below WORK.
        options: arguments of `coral-spec`.
        minutes: estimated, with a GPU to itself.
        keep: folders that others need, by their path below WORK, and where below WORK/keep they are copied.
    """

    lease: str
    out: str
    options: tuple[str, ...]
    minutes: float
    keep: dict[str, str]

    @property
    def alone(self) -> bool:
        """Whether nothing may run beside it: it takes the processor, or is bound by the host."""
        methods = [self.options[at + 1].split(",") for at, each in enumerate(self.options) if each == "--methods"]
        return self.options[0] == "bench" and ("cpu" in self.options or any("hf" in each for each in methods))

    def makes(self) -> set[str]:
        """Folders below WORK that other commands may name."""
        return {str(Path(self.out).parent), *(f"keep/{name}" for name in self.keep.values())}

    def names(self, work: Path) -> set[str]:
        """Everything below WORK that its arguments name."""
        parts = [part for option in self.options for part in re.split("[=,]", option)]
        return {str(Path(part).relative_to(work)) for part in parts if Path(part).is_relative_to(work)}


def needs(jobs: Iterable[Job], work: Path) -> dict[Job, list[Job]]:
    """For each the jobs whose folders it names, so that it begins after them."""
    makers = {folder: job for job in jobs for folder in job.makes()}
    return {
        job: [makers[name] for name in sorted(job.names(work) & set(makers)) if makers[name] is not job] for job in jobs
    }


class Plan:
    """The leases of a study in a folder.

    Args:
        work: the folder.
        prompts: of the answers.
    """

    def __init__(self, work: Path, prompts: Path | None) -> None:
        self.work, self.prompts = work, prompts

    def jobs(self) -> list[Job]:
        """All of them, in the order of the plan."""
        found: list[Job] = []

        def add(lease: str, minutes: float, commands: dict[str, list[str]], keep: dict[str, str] | None = None) -> None:
            for out, options in commands.items():
                own = {path: name for path, name in (keep or {}).items() if Path(path).parts[1] == Path(out).parts[1]}
                found.append(Job(lease, out, tuple(options), minutes, own))

        for family in MODELS:
            small = family == "smollm2"
            for name in ANSWERS[family]:
                add(f"{family}-data", 3.5, self.answers(family, name))
            if small:
                add(f"{family}-sweep", 1.2, self.csra_sweep(family))
            for seed in range(SEEDS if small else 1):
                lease = f"{family}-seed{seed}"
                for recipe, minutes in zip(RECIPES, (4, 6, 8) if small else (7, 9, 11), strict=True):
                    add(lease, minutes, self.recipe(family, recipe, seed), self.keep(f"{family}-{recipe}-{seed}"))
                add(lease, 3, self.acceptance(family, seed))
            if small:
                lease = f"{family}-settings"
                for recipe, (_, _, seeds) in SETTINGS.items():
                    for seed in range(seeds):
                        add(lease, 8, self.setting(family, recipe, seed), self.keep(f"{family}-{recipe}-{seed}"))
                        add(lease, 1.5, self.setting_acceptance(family, recipe, seed))
            trial = f"{family}-router-{GROUPINGS[0]}-{GROUPS[0]}-{ALWAYS[0]}"
            kept = {f"runs/{trial}/drafter": f"drafters/{family}-trial-0"}
            add(f"{family}-router", 1, self.router_sweep(family), kept)
            add(f"{family}-router", 4, self.active_groups(family))
            minutes = 2 if small else 4.5
            add(f"{family}-heads", minutes, self.router(family), self.keep(f"{family}-coral-0"))
            for rank in self.ranks(family):
                add(f"{family}-heads", minutes, self.low_rank(family, rank), self.keep(f"{family}-lowrank{rank}-0"))
            add(f"{family}-heads", 3, self.equal_heads(family))
            add(f"{family}-heads", 1, self.sampled(family))
            add(f"{family}-heads", 2, self.speed(family))
            if small:
                add(f"{family}-bundled", 6, self.answers(family, OWN))
                add(f"{family}-bundled", 16, self.bundled(family), self.keep(f"{family}-bundled-0"))
                add(f"{family}-bundled", 1.5, self.bundled_acceptance(family))
        add("cpu", 0.6, self.cpu())
        return found

    def path(self, *parts: str) -> str:
        return str(self.work.joinpath(*parts))

    @staticmethod
    def keep(name: str) -> dict[str, str]:
        """The drafter of a run."""
        return {f"runs/{name}/drafter": f"drafters/{name}"}

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

    def recipe(self, family: str, recipe: str, seed: int) -> dict[str, list[str]]:
        """One of the three recipes, with equal steps."""
        weight = ["--set", f"csra.weight={WEIGHT[family]}"] if recipe == "csra" else []
        steps = ["--stages", "drafter", "--steps", str(STEPS[family])]
        return self.training(family, f"{family}-{recipe}-{seed}", RECIPES[recipe], seed, *steps, *weight)

    def drafters(self, family: str, seed: int, recipes: Sequence[str] = tuple(RECIPES)) -> list[str]:
        """Options that name kept drafters."""
        names = {LABELS.get(recipe, recipe): f"{family}-{recipe}-{seed}" for recipe in recipes}
        return [part for label, name in names.items() for part in ("--draft", f"{label}={self.drafter(name)}")]

    def drafter(self, name: str) -> str:
        """The folder of a kept drafter."""
        return self.path("keep/drafters", name)

    def evaluation(self, family: str, name: str, *options: str, limit: int = 40) -> dict[str, list[str]]:
        """Acceptance by four processes, by what it leaves."""
        out = f"results/{family}-{name}.json"
        common = ["eval", "--model", MODELS[family], *SETS, "--limit", str(limit), "--workers", "4"]
        return {out: [*common, "--json", self.path(out), "--plot", self.path(out[:-5] + ".png"), *options]}

    def acceptance(self, family: str, seed: int) -> dict[str, list[str]]:
        """All recipes with the full head: tau and acceptance per depth."""
        options = [*self.drafters(family, seed), "--head", "full"]
        greedy = self.evaluation(family, f"recipes-seed{seed}-t0", *options, *GREEDY)
        if family == "smollm2":
            return greedy
        return {**self.evaluation(family, f"recipes-seed{seed}-t1", *options, *TERMS[family]), **greedy}

    def setting(self, family: str, recipe: str, seed: int) -> dict[str, list[str]]:
        """CSRA's best weights at full length, and its alignment to the target with EAGLE-2's one step."""
        preset, weight, _ = SETTINGS[recipe]
        settings = {"weight": weight, "anchor": "target", "temperature": 0.07}
        flags = [part for key, value in settings.items() for part in ("--set", f"csra.{key}={value}")]
        return self.training(family, f"{family}-{recipe}-{seed}", preset, seed, "--stages", "drafter", *flags)

    def setting_acceptance(self, family: str, recipe: str, seed: int) -> dict[str, list[str]]:
        """Of such a drafter with several steps."""
        if SETTINGS[recipe][0] != "coral":
            return {}
        options = [*self.drafters(family, seed, (recipe,)), "--head", "full", *TERMS[family]]
        return self.evaluation(family, f"{recipe}-seed{seed}-t0", *options)

    def bundled(self, family: str) -> dict[str, list[str]]:
        """The drafter and router that the package has: more answers, more steps."""
        name = f"{family}-bundled-0"
        stages = ["--stages", "drafter,router", "--steps", str(LONG), "--set", "evaluation.every=2000"]
        stages += ["--set", f"csra.weight={WEIGHT[family]}"]
        made = self.training(family, name, "coral", 0, *stages, answers=(*ANSWERS[family], OWN))
        return {f"runs/{name}/router/result.json": next(iter(made.values()))}

    def bundled_acceptance(self, family: str) -> dict[str, list[str]]:
        options = [*self.drafters(family, 0, ("csra", "bundled")), "--head", "full", "--head", "16384", *TERMS[family]]
        routed = [*self.drafters(family, 0, ("bundled",)), "--head", "routed", *TERMS[family]]
        return {
            **self.evaluation(family, "bundled-t0", *options),
            **self.evaluation(family, "bundled-routed-t0", *routed),
        }

    def sampled(self, family: str) -> dict[str, list[str]]:
        """EAGLE-2, where its acceptance was measured greedily only, and CORAL at temperature 1."""
        options = [*self.drafters(family, 0, ("eagle2",)), "--head", "full", "--temperature", "1"]
        routed = [*self.drafters(family, 0, ("coral",)), "--head", "routed", "--temperature", "1"]
        evaluations = self.evaluation(family, "eagle2-t1", *options) if family == "smollm2" else {}
        return {**evaluations, **self.evaluation(family, "coral-t1", *routed)}

    def csra_sweep(self, family: str) -> dict[str, list[str]]:
        """One setting changed at a time, and weight with temperature; HASS beside them; then the preset's negatives."""
        tried = {"first-open": ["stop_gradient=false", "anchor=first", "weight=0.1", "temperature=0.07"]}
        for anchor, weight, temperature in CSRA:
            name = f"{anchor}-{weight:g}-{temperature:g}"
            tried[name] = [f"anchor={anchor}", f"weight={weight}", f"temperature={temperature}"]
        tried |= {setting.replace("=", "-"): [f"weight={WEIGHT[family]}", setting] for setting in POOLS}
        commands: dict[str, list[str]] = {}
        for name, settings in tried.items():
            flags = [part for each in settings for part in ("--set", f"csra.{each}")]
            short = ["--stages", "drafter", "--steps", "1500"]
            commands |= self.training(family, f"{family}-sweep-{name}", "coral", 0, *short, *flags)
        return commands

    def router_sweep(self, family: str) -> dict[str, list[str]]:
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
        return commands

    def on_the_drafter(self, family: str, stage: str) -> list[str]:
        return ["--stages", stage, "--drafter", self.drafter(f"{family}-csra-0")]

    def active_groups(self, family: str) -> dict[str, list[str]]:
        """tau by active groups and score scale, on fewer prompts."""
        options = [*self.drafters(family, 0, ("trial",)), "--head", "full", *TERMS[family]]
        for share, scores in itertools.product(SHARES, ("renormalised", "hierarchical")):
            options += ["--head", f"routed:{round(GROUPS[0] * share) - ALWAYS[0]},{scores}"]
        return self.evaluation(family, "active-groups", *options, limit=10)

    def router(self, family: str) -> dict[str, list[str]]:
        """The chosen one, trained in full on the CSRA drafter of seed 0."""
        name = f"{family}-coral-0"
        made = self.training(family, name, "coral", 0, *self.on_the_drafter(family, "router"))
        return {f"runs/{name}/router/result.json": next(iter(made.values()))}

    def low_rank(self, family: str, rank: int) -> dict[str, list[str]]:
        """A head of low rank on the same drafter."""
        name, flags = f"{family}-lowrank{rank}-0", ["--set", f"low_rank.rank={rank}"]
        made = self.training(family, name, "coral", 0, *self.on_the_drafter(family, "low-rank"), *flags)
        return {f"runs/{name}/low-rank/result.json": next(iter(made.values()))}

    def rows(self, family: str, share: float) -> int:
        """Head rows with as many weights as a router that reads this share, and what it reads."""
        return round(ROWS[family] * share) + WIDTH[family] + CHOSEN_GROUPS + 2

    def rank(self, family: str, share: float) -> int:
        """Of a low-rank head with as many weights."""
        return round(self.rows(family, share) * WIDTH[family] / (ROWS[family] + WIDTH[family]))

    def ranks(self, family: str) -> list[int]:
        """Of the low-rank heads."""
        return [self.rank(family, share) for share in LOW_RANK_SHARES]

    def equal_heads(self, family: str) -> dict[str, list[str]]:
        """All heads at equal drafter and tree, and with equal weights, those of the router counted."""
        limit = 20 if family == "smollm2" else 40
        options = [*self.drafters(family, 0, ("coral",)), "--head", "full"]
        for share in SHARES:
            options += ["--head", f"routed:{round(CHOSEN_GROUPS * share) - CHOSEN_ALWAYS}"]
            options += ["--head", str(self.rows(family, share))]
        commands = self.evaluation(family, "heads", *options, *TERMS[family], limit=limit)
        for rank in self.ranks(family):
            low_rank = [*self.drafters(family, 0, (f"lowrank{rank}",)), "--head", "low-rank", *TERMS[family]]
            commands |= self.evaluation(family, f"heads-lowrank{rank}", *low_rank, limit=limit)
        return commands

    def speed(self, family: str) -> dict[str, list[str]]:
        """Each alone on its GPU: full head for all recipes, then the same drafter with the other heads.

        SmolLM2's at temperature 1 too (EAGLE-2 and CORAL's drafter), and with longer answers to more prompts, which end
        to end is what counts.
        """
        full = [f"{recipe}={self.drafter(f'{family}-{recipe}-0')}" for recipe in RECIPES]
        coral = f"{LABELS['coral']}={self.drafter(f'{family}-coral-0')}"
        small, sampled = family == "smollm2", ("--temperature", "1")
        terms = () if small else TERMS[family]
        tried: dict[str, tuple[str, list[str], tuple[str, ...]]] = {
            "full": ("full", ["hf-compiled", "hf", *full], terms),
            "routed": ("routed", [coral], terms),
            "frequency": ("frequency", [coral], terms),
        }
        for rank in self.ranks(family):
            low_rank = f"lowrank{rank}={self.drafter(f'{family}-lowrank{rank}-0')}"
            tried[f"lowrank{rank}"] = ("low-rank", [low_rank], terms)
        if small:
            tried |= {"t1-full": ("full", full[::2], sampled), "t1-routed": ("routed", [coral], sampled)}
            tried |= {"long-full": ("full", full[1:], ()), "long-routed": ("routed", [coral], ())}
            tried |= {"long-auto": ("auto", [coral], ())}
        commands = {}
        for name, (head, methods, more) in tried.items():
            out = f"results/{family}-{'' if name.startswith('long') else 'speed-'}{name}.json"
            size = ("40", "256") if name.startswith("long") else ("10", "128")
            options = ["bench", "--model", MODELS[family], *SETS, "--limit", size[0], "--max-new-tokens", size[1]]
            options += ["--methods", ",".join(["ar", *methods]), "--head", head, "--tree", "6,10,60", *more]
            commands[out] = [*options, "--json", self.path(out), "--plot", self.path(out[:-5] + ".png")]
        return commands

    def cpu(self) -> dict[str, list[str]]:
        """Gemma on two cores with the drafter in this repository: heads with their own and with equal trees, thrice."""
        commands = {}
        for number, temperature, tree, head in itertools.product("123", "01", ("auto", "2,2,3"), CPU_HEADS):
            out = f"results/gemma3-cpu-t{temperature}-{tree.replace(',', '')}-{head}-{number}.json"
            options = ["bench", "--model", MODELS["gemma3"], "--tasks", "sample", "--limit", "4", "--device", "cpu"]
            options += ["--methods", "ar,coral", "--head", head, "--tree", tree, "--max-new-tokens", "96"]
            commands[out] = [*options, "--temperature", temperature, "--json", self.path(out)]
        return commands
