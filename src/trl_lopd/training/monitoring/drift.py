"""Detection of off-policy rollouts: a rule on importance weights, and the advice to sample fresh ones.

The gradient on frozen rollouts differs from the one on fresh rollouts by at most `G * sigma_A * sqrt(chi2)` (Lightning
OPD, arXiv 2604.13010): `G` bounds the score function, `sigma_A` is the advantage's standard deviation, and `chi2` is
the chi-squared divergence of the student from the policy that sampled, `E[w^2] - 1 = 1 / ess - 1` for importance
weights `w` of mean 1. The gradient itself is at most `G * sqrt(E[A^2])`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

# At this value, chi2 is 1 and the bound on the bias is as large as that on the gradient, so it is no longer useful.
MIN_ESS = 0.5


def has_left(metrics: Mapping[str, float]) -> bool:
    """Returns whether the student has left its rollouts: the effective sample size is below `MIN_ESS`, or NaN.

    Args:
        metrics: metrics of [`~objective.summarize`], with `importance_weight/...`.
    """
    return not metrics["importance_weight/ess"] >= MIN_ESS


class DriftMonitor:
    """
    Monitor of the distance between the student and the policy that sampled its rollouts. It reports once that rollouts
    are off-policy from the start, and once that the student has left them.

    Args:
        off_policy (`bool`): Whether other weights than the student's sampled the rollouts. Then the importance weights
            of the first window are always reported.
    """

    def __init__(self, off_policy: bool):
        self.off_policy, self.left = off_policy, False

    def message(self, metrics: Mapping[str, float], step: int, advice: Callable[[], str]) -> str | None:
        """
        Returns the warning for a window; `None` if there is nothing to report.

        Args:
            metrics: metrics of [`~objective.summarize`].
            step: last step of the window.
            advice: returns what to do if the student has left its rollouts, see [`remedy`].
        """
        if "importance_weight/ess" not in metrics:
            return None
        leaves, announced = has_left(metrics) and not self.left, self.off_policy
        self.off_policy, self.left = False, self.left or leaves
        if not (leaves or announced):
            return None
        text = f"Off-policy rollouts, measured up to step {step}: {describe_weights(metrics)}"
        return f"{text} {advice()}" if leaves else text


def describe_weights(metrics: Mapping[str, float]) -> str:
    """Describes the importance weights of a window in a sentence."""
    names = ("mean", "std", "p01", "p50", "p99", "max", "ess")
    return (
        "importance weights of mean {mean:.3f}, standard deviation {std:.3f}, median {p50:.2f}, 98% of them between "
        "{p01:.2f} and {p99:.2f}, largest {max:.2f}, effective sample size {ess:.1%}. (On-policy: 1, 0, 1, 1 and 1, "
        "1, 100%.)"
    ).format(**{name: metrics[f"importance_weight/{name}"] for name in names})


def remedy(output_dir: str, teachers: Iterable[str]) -> str:
    """Returns what to do if the student has left its rollouts, with the command.

    Args:
        output_dir: directory that the student is saved to.
        teachers: ids of the teachers that scored its rollouts. An id does not tell where the teacher can be loaded
            from, so the command has a placeholder.
    """
    return (
        f"Below {MIN_ESS:.0%} nothing bounds the bias of the gradient any more: the student has left its rollouts. "
        f"Save it, sample its answers to PROMPTS again, and continue training from there (TEACHER is "
        f"{' or '.join(sorted({*teachers}))}, wherever you keep it):\n"
        f"trl-lopd rollout --model_name_or_path {output_dir} --dataset_name PROMPTS --output_dir {output_dir}/rollouts"
        f" && trl-lopd score --dataset_name {output_dir}/rollouts --teacher TEACHER --output_dir {output_dir}/table"
    )
