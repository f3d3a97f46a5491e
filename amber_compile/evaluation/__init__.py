"""What sparsity costs a model: dense beside sparse on the same text, in constant memory.

    print(evaluate(model, windows, pattern="2:4"))            loss, KL and top-1, with errors
    evaluate_cases(model, windows, {"2:4": {...}, ...})       several cases, dense once
    evaluate_encoder(model, batches, projections=[...])       sentence embeddings
    evaluate_tasks(model, tokenizer, ["arc_easy"])            lm-evaluation-harness

    text            windows of tokens, from text of any length
    side_by_side    one model, called dense and sparse; nothing else of the process changes
    plots           the error-coverage frontier, and the sensitivity heat map

There is one set of weights. The sparse model is what ``torch.compile(model, backend="amber",
options=...)`` runs, by default without generated code (``backend="amber_eager"``).
"""

from .encoder import EncoderEvaluation, evaluate_encoder, evaluate_encoder_cases
from .generation import Generation
from .language_model import evaluate, evaluate_cases
from .result import Evaluation
from .tasks import TaskResult, evaluate_tasks

__all__ = [
    "EncoderEvaluation",
    "Evaluation",
    "Generation",
    "TaskResult",
    "evaluate",
    "evaluate_cases",
    "evaluate_encoder",
    "evaluate_encoder_cases",
    "evaluate_tasks",
]
