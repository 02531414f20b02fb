"""Fine-tunes a bi-encoder on mined examples with Ray Train. The work of a worker is in ``dagr_ray.training``, without Ray."""

from __future__ import annotations

import logging
import time
from dataclasses import fields
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import pyarrow.compute as pc
from pydantic import Field, model_validator

from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.config import ConfigError
from dagr_ray.core.placement import Pool
from dagr_ray.core.ray_train import TrainWorker, fit, model_files, model_folder
from dagr_ray.core.stage import Inputs, Output, Run, Stage
from dagr_ray.losses import Loss
from dagr_ray.losses.info_nce import InfoNCE
from dagr_ray.retrieval import encoder, model_folder as model_folders
from dagr_ray.retrieval.encoder import Encoder
from dagr_ray.training import texts
from dagr_ray.training.checkpoints import Checkpoints
from dagr_ray.training.dev import MEASURE, Dev
from dagr_ray.training.lora import LoRA
from dagr_ray.training.model_card import model_card
from dagr_ray.training.settings import Settings

log = logging.getLogger("dagr")


class Train(Stage):
    """``base`` fine-tuned on ``examples`` with the weighted sum of ``losses``.

    ``batch_size`` is the size of a whole step: workers share each batch and gather its embeddings, so that their number
    changes only the order of additions (``step``). For that reason, and because a CPU is faster without it, there is no
    dropout unless ``dropout`` is set. An epoch uses each example once; its last batch may be smaller. If another order
    can avoid it, no passage occurs twice in a batch as one query's positive and another's negative (``repeats`` counts
    the cases in which it cannot), and a passage that any example has as a query's positive is never that query's negative
    in the batch. ``curriculum`` starts with easy examples: those with the largest margin of the positive over the best
    negative, by the scores in ``examples`` (the first search's, or the teacher's after ``Relabel``). ``steps`` ends the
    training after this many steps, in as many epochs as needed.

    A base reads texts in training as in search, with its prompts; if its vectors are truncated, the truncated ones are
    trained. The model is saved with the base's prompts and length, not those of training. Tables of words (static models)
    are trained without ``lora`` and without ``cached`` losses.

    ``start`` is a training of the same base, whose model is trained further. ``warmup`` is the share of the steps in which
    the learning rate rises; then it falls to zero in a line or half a cosine, or is constant. Passages are truncated to
    ``max_length`` tokens in training. ``precision`` ``auto`` computes in the base's ``dtype``; weights stay float32.
    ``lora`` trains adapters instead of the weights; use a tenfold ``lr`` for them.

    ``dev`` has queries judged in ``qrels.<dev_split>``, whose passages may not be positives of examples (``DevSplit`` makes
    such a set); they are searched in ``dev_corpus`` (the dev set's own corpus, else the training's). nDCG@10 is computed
    before the first step, every ``eval_every`` steps (a tenth of them) and at the end. The model with the best value is
    kept, including the base, and training ends after ``patience`` evaluations without improvement.

    The metrics hold the mean loss of every few steps as ``loss@<step>``, and ``nDCG@10@<step>`` of split ``dev``. Counts:
    ``effective_negatives`` is the mean number of negatives per query, by loss; ``padding`` the share of computed tokens
    that were padding; ``best_step`` is 0 if the base was better than every later model.
    """

    abstract: ClassVar[bool] = False
    role: ClassVar[str] = "train"
    rows_from: ClassVar[str] = "examples"
    version: ClassVar[int] = 3
    pool: ClassVar[str] = "train"
    starts_workers: ClassVar[bool] = True
    outputs: ClassVar[tuple[str, ...]] = ("metrics",)
    judged: ClassVar[dict[str, str]] = {"dev": "dev_split"}
    examples: Stage
    queries: Stage
    corpus: Stage
    base: Encoder
    start: Stage | None = None
    dev: Stage | None = None
    dev_split: str = "dev"
    dev_corpus: Stage | None = None
    eval_every: Annotated[int, Field(ge=1)] | None = None
    patience: Annotated[int, Field(ge=1)] | None = None
    losses: Annotated[tuple[Loss, ...], Field(min_length=1)] = (InfoNCE(),)
    epochs: Annotated[int, Field(ge=1)] = 1
    steps: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 32
    lr: Annotated[float, Field(gt=0)] = 2e-5
    max_length: Annotated[int, Field(ge=8)] = 128
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    precision: Literal["auto", "bf16", "float32"] = "auto"
    gradient_checkpointing: bool = False
    lora: LoRA | None = None
    curriculum: bool = False
    # numpy's global generator, which transformers seeds, takes no other
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    @model_validator(mode="after")
    def _fits(self) -> Train:
        names = [loss.type for loss in self.losses]
        if len(set(names)) < len(names):
            raise ConfigError(
                f"train: losses = {', '.join(names)}: a kind occurs twice; give each once, with its weight"
            )
        if self.start is not None and (not isinstance(self.start, Train) or self.start.base != self.base):
            raise ConfigError(
                f"train: start = {self.start.label()!r} is not a training of the same base; give one that is"
            )
        if self.patience is not None and self.dev is None:
            raise ConfigError(f"train: patience = {self.patience} needs a dev set; set dev, or remove patience")
        if self.dev_corpus is not None and self.dev is None:
            raise ConfigError("train: dev_corpus is set but dev is not; set dev, or remove dev_corpus")
        return self

    def identity(self) -> dict[str, Any]:
        """Without fields that trade memory for time and change no result."""
        return {k: v for k, v in super().identity().items() if k != "gradient_checkpointing"}

    def label(self) -> str:
        return self.base.label()

    def check(self) -> None:
        """Raises ConfigError if the base cannot be trained with these fields."""
        if not self.base.local:
            return
        kinds = model_folders.kinds(self.base.folder, "train")
        if not model_folders.has_trainable_weights(self.base.folder, "train"):
            raise ConfigError(f"train: base = {self.base.model!r} has no trainable weights; give another base")
        tables_of_words = sorted({"StaticEmbedding", "BoW"} & set(kinds))
        if tables_of_words and self.lora is not None:
            raise ConfigError(f"train: lora: base = {self.base.model!r} is a {tables_of_words[0]}; remove lora")
        if tables_of_words and any(getattr(loss, "cached", None) for loss in self.losses):
            raise ConfigError(
                f"train: cached: base = {self.base.model!r} is a {tables_of_words[0]}, whose batches need no cutting; "
                "leave cached out"
            )
        if self.lora is not None and kinds and "Transformer" not in kinds:
            raise ConfigError(f"train: lora: base = {self.base.model!r} has no transformer; remove lora")

    def job(self, pool: Pool) -> Job:
        """The settings for the workers."""
        named = {f.name for f in fields(Settings)} & set(Train.model_fields)
        settings = Settings(
            **{name: getattr(self, name) for name in named}, checkpoint_every=pool.checkpoint_every, fsdp=pool.fsdp
        )
        card = self.to_json() | {"sources": {k: v.folder_name() for k, v in self.inputs().items()}}
        card |= {"fingerprint": self.fingerprint(), "base_identity": self.base.identity()}
        return Job(self.base, settings, self.dev_split, card)

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            self._check(inputs["examples"])
            started = time.time()
            result = fit(_work, {"job": self.job(pool)}, inputs, folder, pool)
            curve = [{"measure": f"loss@{step}", "value": loss} for step, loss in result["losses"]]
            dev = [{"measure": f"{MEASURE}@{step}", "value": v, "split": "dev"} for step, v in result["dev"]]
            counts = {
                "in": inputs["examples"].count("examples"),
                "out": result["counts"]["examples"],
                **result["counts"],
            }
            if dev and not counts["best_step"]:
                log.warning(
                    "%s: the base is better on the dev set (%s %.4f) than every trained model; the base is kept",
                    folder.name, MEASURE, result["dev"][0][1],
                )  # fmt: skip
            cost = {"train_s": result["train_s"], "setup_s": time.time() - started - result["train_s"]}
            files = [f"model/{name}" for name in result["files"]]
            Checkpoints(folder, "").clear()
            return Output(
                {"metrics": tables.table("metrics", curve + dev)}, files, counts, cost | {"samples": result["samples"]}
            )

        return run

    def _check(self, examples: Artifact) -> None:
        """Raises ConfigError if the examples do not fit the fields. Reads them range by range."""
        rows, name = examples.count("examples"), examples.name
        if not rows:
            raise ConfigError(
                f"train: examples = {name!r} has no rows; generate more, or relax the filters "
                "(dagr show says which refused what)"
            )
        if self.lora is not None:
            self.lora.check()
        by = next((loss.type for loss in self.losses if loss.needs_scores), "curriculum" if self.curriculum else None)
        if by is None:
            return
        for part in texts.ranges(examples, "examples", ["negative_ids", "positive_score", "negative_scores"]):
            negatives, scores = (pc.list_value_length(part[c]) for c in ("negative_ids", "negative_scores"))
            if pc.any(pc.equal(negatives, 0)).as_py():
                raise ConfigError(
                    f"train: {by} compares scores, but examples = {name!r} has rows without negatives; mine some"
                )
            short = pc.any(pc.not_equal(negatives, pc.fill_null(scores, -1))).as_py()
            flat = pc.list_flatten(part["negative_scores"])
            if short or part["positive_score"].null_count or flat.null_count:
                raise ConfigError(
                    f"train: {by} needs a score for every positive and negative, but examples = {name!r} lacks some; "
                    "have a teacher score them with Label, and put the scores in with Relabel"
                )


# -- on the workers --------------------------------------------------------------------------------------------------


class Job(NamedTuple):
    """Settings for a worker: without stages, because a worker may lack the files that these stand for."""

    base: Encoder
    settings: Settings
    dev_split: str
    card: dict[str, Any]


def _work(config: dict[str, Any], worker: TrainWorker) -> dict[str, Any] | None:
    """One worker of a training."""
    from dagr_ray.training import loop, lora

    job, inputs, folder = config["job"], worker.inputs, worker.folder
    rank, workers, settings = worker.rank, worker.workers, job.settings
    checkpoints = Checkpoints(folder, worker.attempt, rank, workers)
    data = texts.fetch(inputs["examples"], inputs["queries"], inputs["corpus"])
    dev = None
    if "dev" in inputs:
        own = inputs["dev"] if "corpus" in inputs["dev"].table_names() else inputs["corpus"]
        dev = Dev(inputs["dev"], job.dev_split, inputs.get("dev_corpus", own))
        dev.check(data)
    before = inputs["start"].local_path("model") if "start" in inputs else None
    model = encoder.load(job.base, device=worker.device, model=before)
    fitted = loop.fit(model, job.base, data, settings, rank=rank, workers=workers, dev=dev, checkpoints=checkpoints)
    data.remove()
    if rank:
        return None
    if settings.fsdp and workers > 1:  # the trained model is in pieces
        model = encoder.load(job.base, device="cpu", model=before)
        if settings.lora is not None:
            lora.adapt(model, settings.lora, settings.seed)
        model.load_state_dict(fitted.weights, strict=False)
    if settings.lora is not None:
        lora.merge(model)
    counts = fitted.counts | ({"best_step": fitted.best_step} if fitted.dev else {})
    summary: dict[str, Any] = {"losses": fitted.losses, "dev": fitted.dev, "counts": counts}
    summary |= {"samples": fitted.samples, "train_s": fitted.seconds}
    summary |= {
        "prompts": job.base.prompts(),
        "reads": [module.max_seq_length for module in encoder.transformers(model)],
    }
    model.similarity_fn_name = "cosine"  # the similarity of training and search
    with model_folder(folder) as target:
        encoder.save(model, target)
        (target / "README.md").write_text(model_card(job.card, summary), encoding="utf-8")
        summary["files"] = model_files(target)
    return summary
