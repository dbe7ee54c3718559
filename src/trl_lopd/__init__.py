"""Offline on-policy distillation for the Hugging Face stack.

The names below are the public API. Each is imported on first use, so that `import trl_lopd` costs milliseconds and
loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_MODULE_OF = {
    "EffOPDCallback": "effopd.callback",
    "OfflineOPDConfig": "training.config",
    "OfflineOPDError": "errors",
    "OfflineOPDTrainer": "training.trainer",
    "RewardGate": "effopd.gates",
    "SGLangServer": "generation.servers",
    "ShardError": "errors",
    "TableError": "errors",
    "TableSummary": "table.schema",
    "TeacherConsistencyError": "errors",
    "ServerError": "errors",
    "TeacherFingerprint": "identity.fingerprint",
    "TeacherStampCallback": "identity.stamp",
    "VLLMServer": "generation.servers",
    "Verdict": "identity.consistency",
    "check_teacher_consistency": "identity.consistency",
    "collect_rollouts": "generation.rollouts",
    "compare_models": "evaluation.comparison",
    "evaluate_model": "evaluation.evaluate",
    "fingerprint_teacher": "identity.fingerprint",
    "generate_sft_data": "generation.rollouts",
    "load_benchmark": "evaluation.evaluate",
    "load_table": "identity.cards",
    "read_dataset_card": "identity.cards",
    "read_model_card": "identity.cards",
    "residualize_table": "generation.residual",
    "score_rollouts": "generation.scoring",
    "stamp_dataset_card": "identity.cards",
    "stamp_model_card": "identity.cards",
    "table_features": "table.schema",
    "validate_table": "table.schema",
    "verify_served_teacher": "identity.probes",
    "write_report": "evaluation.report.report",
}

__all__ = list(_MODULE_OF)

if TYPE_CHECKING:
    from .effopd.callback import EffOPDCallback
    from .effopd.gates import RewardGate
    from .errors import OfflineOPDError, ServerError, ShardError, TableError, TeacherConsistencyError
    from .evaluation.comparison import compare_models
    from .evaluation.evaluate import evaluate_model, load_benchmark
    from .evaluation.report.report import write_report
    from .generation.residual import residualize_table
    from .generation.rollouts import collect_rollouts, generate_sft_data
    from .generation.scoring import score_rollouts
    from .generation.servers import SGLangServer, VLLMServer
    from .identity.cards import load_table, read_dataset_card, read_model_card, stamp_dataset_card, stamp_model_card
    from .identity.consistency import Verdict, check_teacher_consistency
    from .identity.fingerprint import TeacherFingerprint, fingerprint_teacher
    from .identity.probes import verify_served_teacher
    from .identity.stamp import TeacherStampCallback
    from .table.schema import TableSummary, table_features, validate_table
    from .training.config import OfflineOPDConfig
    from .training.trainer import OfflineOPDTrainer


def __getattr__(name: str):
    if name in _MODULE_OF:
        return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
