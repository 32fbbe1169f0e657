"""VLCP: Dataset Distillation via Vision-Language Category Prototypes (Zou et al., ICCV 2025, arXiv 2506.23580).

Let a diffusion model draw a few images of each class, each from a pair (image prototype, text prototype), instead of
learning pixels. Nothing here is differentiated through; students are trained on the drawn images as on real ones.

buffer.py    Captions    A vision-language model says of each training image how its object looks
                         (prototype_captions.py), or a metadata.jsonl says so.
             Tuning      The denoiser of a latent diffusion model learns images and captions (prototype_tuning.py):
                             L = E ‖ε − ε_θ(√ᾱ_t z + √(1 − ᾱ_t) ε, t, c)‖²,   z an image's latent, c its caption
distill.py   Prototypes  Of each class by itself (prototype_classes.py): latents of all its images; outliers out by LOF;
                         k-means into ipc clusters, whose means are the image prototypes μ. The text prototype of a
                         cluster is the one of its captions that has the most of the cluster's own frequent words
                         (prototype_texts.py).
             Synthesis   Image to image from each pair (prototype_synthesis.py): noise on μ up to `strength`, then
                         denoising guided by the caption.
eval.py      Two published protocols (prototype_judging.py): hard labels (`--protocol minimax`, methods/core/
             hard_labels.py) and a teacher's soft ones (`--protocol rded`, methods/core/soft_labels.py).

Each stage notes in manifest.json what it used and made, and the next one reads it there.

Where the released code differs or cannot be: its scripts need patched libraries and file names that do not agree; words
are matched as substrings of captions and labels, so that "red" is found in "hundred" (`--compat vlcp` has all of that);
classes are matched by position; latents are random samples (`--latent sample`, here their mode); a prompt may be empty;
nothing resumes. Here classes are known by their folders' names, every image has noise of its own, whatever is made with
it and in which order, and each stage goes on where it was killed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.catalogue import CatalogueConfig, build_catalogue
from data.metadata import METADATA, captions_digest, metadata_file, read_metadata
from methods.prototype_captions import CaptionConfig, write_captions
from methods.prototype_classes import COMPAT, PrototypeConfig
from methods.prototype_files import ExchangeConfig, Manifest, export_published, load_prototypes
from methods.prototype_gallery import PrototypeGallery
from methods.prototype_judging import Eval, evaluate, recorded
from methods.prototype_origin import CaptionSource, Origin, from_folder, from_images, from_published
from methods.prototype_synthesis import Synthesis, SynthesisConfig
from methods.prototype_texts import TextConfig
from methods.prototype_tuning import MODEL, TuneConfig, check_model, tune
from networks.diffusion import (
    LatentModel,
    autoencoder_digest,
    denoising_steps,
    load_model,
    model_digest,
    open_model,
)
from utils.config import flat, option, peek, section
from utils.errors import UserError
from utils.files import file_digest
from utils.folders import check_folder, folder_digests
from utils.progress import progress
from utils.run import Run, RunConfig

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class BufferStages:
    """Which stages buffer.py does, and where its files go."""

    stages: tuple[str, ...] = option(
        ("caption", "finetune"), "what to do", choices=("caption", "finetune"), aliases=("stage",), free=True
    )
    recaption: bool = option(False, "caption the images even where captions are given")
    buffer_path: str = option("", "run folder (empty: runs/vlcp/<name>/buffers)", aliases=("output_dir",), free=True)
    dtype: str = option("auto", "numbers of the captioning model; auto: float16 on cuda", choices=("auto", *DTYPES))


@dataclass(frozen=True)
class DistillStages:
    """Which stages distill.py does, with which model, and where its files go."""

    stages: tuple[str, ...] = option(
        ("prototypes", "synthesize"), "what to do", choices=("prototypes", "synthesize"), aliases=("stage",), free=True
    )
    diffusion_checkpoints_path: str = option(
        "", "diffusion model: a folder, a hub id or tiny (empty: the one that buffer.py tuned)", free=True
    )
    buffer_path: str = option("", "run folder of buffer.py (empty: runs/vlcp/<name>/buffers)", free=True)
    save_dir: str = option("", "run folder (empty: runs/vlcp/<name>)", free=True)
    save_init_image_path: str = option(
        "", "folder in which one of the published name takes the images (empty: images in the run folder)", free=True
    )
    compat: str = option(
        "",
        "vlcp: as released, that is --text_match substring --ties first --score sum --latent sample --medoid false, "
        "where these are not given",
        choices=("", "vlcp"),
    )
    dtype: str = option("auto", "numbers of the diffusion model; auto: float16 on cuda", choices=("auto", *DTYPES))
    draw: bool = option(True, "write a sheet of pictures for each class, and the page", free=True)


@dataclass(frozen=True)
class Buffer:
    """Caption the training images and tune a diffusion model on them."""

    method: str = option("vlcp", "the system")
    data: CatalogueConfig = section(CatalogueConfig)
    run: RunConfig = section(RunConfig)
    steps: BufferStages = section(BufferStages)
    given: CaptionSource = section(CaptionSource)
    caption: CaptionConfig = section(CaptionConfig)
    tuning: TuneConfig = section(TuneConfig)


@dataclass(frozen=True)
class Distill:
    """Find pairs of image and text prototypes of each class, and draw an image of each."""

    method: str = option("vlcp", "the system")
    data: CatalogueConfig = section(CatalogueConfig)
    run: RunConfig = section(RunConfig)
    steps: DistillStages = section(DistillStages)
    given: CaptionSource = section(CaptionSource)
    prototypes: PrototypeConfig = section(PrototypeConfig)
    texts: TextConfig = section(TextConfig)
    exchange: ExchangeConfig = section(ExchangeConfig)
    synthesis: SynthesisConfig = section(SynthesisConfig)

    def idle(self) -> dict[str, str]:
        named = self.exchange.save_prototype_path or self.steps.save_init_image_path
        return {} if named else {"km_expand": "--save_prototype_path or --save_init_image_path"}


__all__ = ["CONFIGS", "buffer", "distill", "evaluate", "preset", "recorded"]  # the verbs; prototype_judging.py has some

NOTES = ("config.yaml", "inputs.json", Manifest.NAME)  # of a run that has made nothing yet
CONFIGS = {"buffer": Buffer, "distill": Distill, "eval": Eval}
SHARED = ("eval",)  # verbs that several processes may share


def preset(argv: Sequence[str]) -> dict[str, Any]:
    """What takes the place of defaults in this command: the released code's choices, where `--compat` asks for them."""
    return dict(COMPAT) if peek(argv, ("compat",)).get("compat") == "vlcp" else {}


def buffer(cfg: Buffer) -> None:
    """Captions and a tuned model in the run folder; what is there already is not made again."""
    classes = build_catalogue(cfg.data)
    given = None if cfg.steps.recaption else cfg.given.find(classes)
    captions = None if given is None else read_metadata(given, classes, cfg.given.allow_missing)
    run = Run(cfg.steps.buffer_path or home(cfg) / "buffers", cfg, "buffer", "--buffer_path")
    folder, manifest = run.folder, Manifest(run.folder)
    if "finetune" in cfg.steps.stages:
        check_model(cfg.tuning, folder, cfg.data.cache_dir, run.device)
    # An image that cannot be decoded is told before anything is made, and can be mended: the data are others then.
    made = (path for path in folder.rglob("*") if path.name not in NOTES and path.name[0] != ".")
    begun = any(path.is_file() and path.stat().st_size for path in made)
    known = None if captions is None else captions_digest(captions)
    run.pin(anew=not begun, training_set=classes.fingerprint(), captions=known)
    if not begun:
        classes.check_images()
    if captions is None and "caption" in cfg.steps.stages:
        dtype = number_type(cfg.steps.dtype, run.device)
        captions = write_captions(cfg.caption, classes, folder, run.device, dtype, run.seed)
        if captions is None:
            return
    if captions is None:
        given = folder / METADATA
        captions = read_metadata(given, classes, cfg.given.allow_missing)
    path, by = (given, "given") if given else (folder / METADATA, cfg.caption.caption_model)
    if "finetune" in cfg.steps.stages:
        _learned(cfg, manifest, captions_digest(captions), begun)
    manifest.record("data", **flat(cfg.data))
    noted = {"count": len(captions), "digest": captions_digest(captions), "file": file_digest(metadata_file(path))}
    manifest.record("captions", path=str(path), by=by, **noted)
    print(f"{len(captions):,} captions in {path}")
    if "finetune" in cfg.steps.stages:
        model = tune(cfg.tuning, classes, captions, folder, run)
        files = manifest.section("model").get("files") or folder_digests(model)
        manifest.record("model", path=str(model), base=cfg.tuning.model, files=files)
        print(f"the diffusion model is in {model}")


def _learned(cfg: Buffer, manifest: Manifest, captions: str, begun: bool) -> None:
    """Note what the model learns from and begins as, by digests; UserError where one that is `begun` had others, or one
    that is done is damaged."""
    noted, folder = manifest.section("model"), manifest.folder
    inputs: dict[str, Any] = {"captions": captions}
    if (folder / MODEL).is_dir():  # what it began as may be gone
        check_folder(folder / MODEL, noted.get("files", {}), "restore it, or remove that folder to tune the model anew")
    else:
        inputs["files"] = {}
        inputs["began_as"] = model_digest(open_model(cfg.tuning.model, cfg.data.cache_dir))
    for name, what in (("captions", "was tuned on other captions"), ("began_as", "began as another --model")):
        if begun and name in inputs and noted.get(name, inputs[name]) != inputs[name]:
            raise UserError(
                f"the model in {folder} {what}; resume it with those files, or choose another --buffer_path"
            )
    manifest.record("model", **inputs)


def distill(cfg: Distill) -> None:
    """Prototypes, and an image of each, in the run folder; classes and images that are there are not made again."""
    folder = Path(cfg.steps.save_dir or home(cfg))
    buffers = Path(cfg.steps.buffer_path or folder / "buffers")
    source = open_model(_model(cfg, buffers), cfg.data.cache_dir, "diffusion_checkpoints_path")
    origin = _origin(cfg, folder, buffers, source)  # mistakes in captions and files are told before there is a run
    run = Run(folder, cfg, "distill", "--save_dir")
    manifest, place = Manifest(run.folder), run.folder / "prototypes"
    drawn_by = model_digest(source) if "synthesize" in cfg.steps.stages else ""
    images = _images(cfg, run, manifest, drawn_by)

    @functools.cache
    def model() -> LatentModel:
        dtype = number_type(cfg.steps.dtype, run.device)
        return load_model(source, run.device, dtype, safety=cfg.synthesis.safety_checker)

    if not run.resumed:
        model()  # what cannot be loaded is told while the command can still be corrected
    # Prototypes note for themselves what they are made of, class by class; images do not.
    if origin.inputs:
        run.pin(anew=not manifest.section("images"), **origin.inputs)
    manifest.record("data", **flat(cfg.data))
    idents = [found.ident for found in origin.make(run.folder, run.seed, model)]
    noted = {"path": str(place), "classes": idents, "ipc": cfg.prototypes.ipc, "train_root": origin.train_root}
    manifest.record("prototypes", **noted, **origin.inputs)
    print(f"prototypes of {len(idents)} classes in {place}")
    if cfg.exchange.save_prototype_path:
        _export(cfg, place, idents)
    if "synthesize" in cfg.steps.stages:
        manifest.record("images", path=str(images.absolute()), model=drawn_by)
        _draw(cfg, run, manifest, images, idents, model())


def _draw(cfg: Distill, run: Run, manifest: Manifest, images: Path, idents: list[str], model: LatentModel) -> None:
    """Make every image that is not there yet, class by class, and then the class's sheet."""
    ipc = cfg.prototypes.ipc
    synthesis = Synthesis(model, cfg.synthesis, cfg.data.listed, run.seed)
    if not cfg.synthesis.safety_checker and (Path(model.source) / "safety_checker").is_dir():
        print("note: the model's safety checker is off, as released; --safety_checker makes anew what it flags")
    train = manifest.section("prototypes")["train_root"]
    gallery = PrototypeGallery(run.folder, images, train and Path(train), flat(cfg)) if cfg.steps.draw else None
    with progress(total=len(idents) * ipc, what="images", unit="image") as bar:
        for ident in idents:
            found = load_prototypes(run.folder / "prototypes", ident)
            synthesis(images, found, ipc, bar)
            if gallery is not None:
                gallery.add(found)
    noted = {
        "path": str(images.absolute()),
        "size": synthesis.side,
        "ipc": ipc,
        "seed": run.seed,
        "count": len(idents) * ipc,
    }
    manifest.record("images", **noted, **flat(cfg.synthesis))
    if synthesis.flagged:
        print(f"the safety checker turned down {synthesis.flagged} images, which were made anew")
    how = cfg.synthesis
    steps = denoising_steps(how.strength, how.num_inference_steps)
    print(f"each image took {steps} of {how.num_inference_steps} denoising steps")
    if gallery is not None:
        print(f"look at {gallery.finish()}")
    print(f"{len(idents) * ipc:,} images of {synthesis.side} x {synthesis.side} pixels in {images}")


def home(cfg: Buffer | Distill) -> Path:
    """The run folder where no flag names one."""
    return Path("runs") / cfg.method / (cfg.run.name or cfg.data.row)


def number_type(name: str, device: torch.device) -> torch.dtype:
    """The numbers that a frozen network computes with; half precision is for accelerators."""
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    if device.type == "cpu" and name == "float16":
        raise UserError("--dtype float16 needs a GPU; give --dtype float32 (or bfloat16) on the CPU")
    return DTYPES[name]


def _model(cfg: Distill, buffers: Path) -> str:
    """The diffusion model's folder or name: the one that a flag names, which may be a run of buffer.py, or buffer.py's
    own."""
    named = cfg.steps.diffusion_checkpoints_path
    if named and not (Path(named).expanduser() / MODEL / "model_index.json").is_file():
        return named
    tuned = (Path(named).expanduser() if named else buffers) / MODEL
    if not tuned.is_dir():
        raise UserError(
            f"no diffusion model in {buffers}; run buffer.py first, or give --diffusion_checkpoints_path, such as the "
            "folder of stable-diffusion-v1-5, or tiny"
        )
    files = Manifest(tuned.parent).section("model").get("files", {})
    check_folder(tuned, files, f"restore it, or give --diffusion_checkpoints_path {tuned} to use the model as it is")
    return str(tuned)


def _origin(cfg: Distill, folder: Path, buffers: Path, source: str) -> Origin:
    """Where this command's prototypes come from."""
    path = cfg.exchange.prototype_path
    if path and not Path(path).is_dir():
        return from_published(cfg.exchange, cfg.data, cfg.prototypes.ipc)
    if path or "prototypes" not in cfg.steps.stages:
        place = Path(path or folder / "prototypes")
        known = Manifest.find(place)
        if known is None or not known.section("prototypes"):
            raise UserError(f"no prototypes in {place}; run distill.py with --stages prototypes first")
        own = place.resolve() == (folder / "prototypes").resolve()
        return from_folder(place, known.section("prototypes"), cfg.prototypes.ipc, own)
    return from_images(cfg.data, cfg.given, cfg.prototypes, cfg.texts, buffers, autoencoder_digest(source))


def _export(cfg: Distill, place: Path, idents: list[str]) -> None:
    """Write the prototypes as the released code does, for programs that read those files."""
    found = (load_prototypes(place, ident) for ident in idents)
    folder, words = Path(cfg.exchange.save_prototype_path), cfg.texts
    name, ipc, wide = cfg.data.row, cfg.prototypes.ipc, cfg.exchange.km_expand
    images, texts = export_published(folder, found, name, ipc, words.threshold, words.tpk, wide)
    print(f"written as published to {images} and {texts}")


def _images(cfg: Distill, run: Run, manifest: Manifest, drawn_by: str) -> Path:
    """The folder of the images: in the run folder, or of the published name (with the seed) where a flag says so.

    drawn_by   digest of the model that is to draw; empty where none is
    UserError where it holds images that this run did not make, or not with this model.
    """
    images, own, flag = run.folder / "images", run.resumed, "--save_dir"
    if cfg.steps.save_init_image_path:
        images, flag = _published_images(cfg), "--save_init_image_path"
        own = own and manifest.section("images").get("path") == str(images.absolute())
    if "synthesize" in cfg.steps.stages and not own and images.is_dir() and any(images.iterdir()):
        raise UserError(f"{images} already holds images; choose another {flag}, or move them away")
    if drawn_by and manifest.section("images").get("model", drawn_by) != drawn_by:
        raise UserError(
            f"{run.folder} holds images of another diffusion model (it was tuned anew, or replaced, since); resume it "
            "with the model it began with, or choose another --save_dir"
        )
    return images


def _published_images(cfg: Distill) -> Path:
    how, ipc = cfg.synthesis, cfg.prototypes.ipc
    name = f"{cfg.data.dataset}_ipc{ipc}_{ipc}_s{how.strength}_g{how.guidance_scale}_kmexpand{cfg.exchange.km_expand}"
    return Path(cfg.steps.save_init_image_path) / f"{name}_seed{cfg.run.seed}"
