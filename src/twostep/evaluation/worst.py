"""Where a figure comes from: a student's pictures that do worst by it, beside the teacher's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from twostep.evaluation.entries import Entry
from twostep.evaluation.figures import AlignedSets, Measured
from twostep.evaluation.prompts import PromptSet
from twostep.evaluation.report.pictures import Pair, PictureGroup

_SHOWN = 6
_BESIDE = "Teacher on the left, student on the right, from the same noise."


def worst_pictures(
    aligned: AlignedSets,
    entries: Sequence[Entry],
    prompts: PromptSet,
    *,
    pictures: Mapping[Entry, Tensor],
    reference: Tensor,
) -> list[PictureGroup]:
    """The first student's worst pictures, a group for each kind of figure; and the closest.

    Args:
        entries: the first is the teacher.
        pictures: (N, 3, H, W) in -1..1 of each entry, rows as in `aligned`; `reference` likewise.
    """
    chosen = next((entry for entry in entries if entry.kind == "student"), None)
    if chosen is None:
        return []
    teacher, student = pictures[entries[0]], pictures[chosen]
    measured, count = aligned.sets[chosen.key], min(_SHOWN, len(prompts) // 2)
    captions, seeds = prompts.captions, prompts.noise_seeds()
    other_seeds = prompts.noise_seeds(reference=True)

    def beside(row: int, note: str = "") -> Pair:
        return Pair(captions[row], teacher[row], student[row], seed=seeds[row], note=note)

    apart = (measured.features - aligned.teacher.features).norm(dim=1)
    order = apart.argsort(descending=True).tolist()
    distances = torch.cdist(measured.features, aligned.reference.features)
    strange, missed = distances.min(1), distances.min(0)
    groups = [
        PictureGroup(
            ("paired_distance",), "Furthest apart", _BESIDE, [beside(row) for row in order[:count]]
        ),
        PictureGroup((), "Closest", _BESIDE, [beside(row) for row in order[-count:][::-1]]),
        PictureGroup(
            ("frechet_to_teacher", "kernel_to_teacher", "gaussian_to_teacher", "precision",
             "density"),
            "Least like anything of the teacher’s",
            "The student on the right, and on the left what is nearest to it in the teacher’s "
            "second set, of whatever prompt.",
            [
                Pair(captions[row], reference[near], student[row], seed=seeds[row],
                     note=f"nearest at {strange.values[row]:.3g}")
                for row, near in _largest(strange.values, strange.indices, count)
            ],
        ),
        PictureGroup(
            ("recall", "coverage"),
            "Of the teacher’s, what the student comes least near to",
            "The teacher’s second set on the left, and on the right what is nearest to it among "
            "the student’s, of whatever prompt.",
            [
                Pair(captions[row], reference[row], student[near], seed=other_seeds[row],
                     note=f"nearest at {missed.values[row]:.3g}")
                for row, near in _largest(missed.values, missed.indices, count)
            ],
        ),
        _alike(aligned, measured, prompts, student=student, count=count),
        *_by_scores(measured, aligned.teacher, beside, count=count),
    ]  # fmt: skip
    return [group for group in groups if group.pairs]


def _largest(values: Tensor, beside: Tensor, count: int) -> list[tuple[int, int]]:
    rows = values.argsort(descending=True)[:count]
    return list(zip(rows.tolist(), beside[rows].tolist(), strict=True))


def _alike(
    aligned: AlignedSets, measured: Measured, prompts: PromptSet, *, student: Tensor, count: int
) -> PictureGroup:
    """Prompts whose first two seeds the student tells apart least, by the teacher's measure."""
    pairs: list[Pair] = []
    number = len(prompts.prompts)
    if prompts.seeds_per_prompt > 1:
        spread = [
            (each.features[:number] - each.features[number : 2 * number]).norm(dim=1)
            for each in (measured, aligned.teacher)
        ]
        share = spread[0] / spread[1].clamp_min(1e-12)
        seeds = prompts.noise_seeds()
        pairs = [
            Pair(prompts.prompts[row], student[row], student[row + number], seed=seeds[row],
                 note=f"and seed {seeds[row + number]}; {share[row]:.2f} of the teacher’s distance")
            for row in share.argsort()[:count].tolist()
        ]  # fmt: skip
    return PictureGroup(
        ("diversity", "vendi"),
        "Most alike",
        "Both are the student’s, of one prompt from two seeds.",
        pairs,
    )


def _by_scores(
    measured: Measured, teacher: Measured, beside: Callable[[int, str], Pair], *, count: int
) -> list[PictureGroup]:
    """The lowest of each score, where the teacher did better; categories are in `overall`."""
    groups = []
    for name, score in _main(measured.scores).items():
        short = (teacher.scores[name] - score).nan_to_num(-torch.inf)
        # The largest loss first, and among equals those that score least.
        rows = sorted(range(len(score)), key=lambda row: (-short[row].item(), score[row].item()))
        rows = [row for row in rows if short[row] > 0][:count]
        word = name.removesuffix(".overall").replace("_", " ")
        groups.append(
            PictureGroup(
                (name.removesuffix(".overall"),),
                f"Worst in {word}, where the teacher is better",
                _BESIDE,
                [
                    beside(row, f"{score[row]:.2f}, the teacher’s {teacher.scores[name][row]:.2f}")
                    for row in rows
                ],
            )
        )
    return groups


def _main(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: value
        for name, value in scores.items()
        if "." not in name or name.endswith(".overall")
    }
