"""Models that are known to work: task, test, measured figures, and the command that reproduces them.

Add a row to ``KNOWN`` for a new family or a newly measured model. Figures are those of ``benchmarks/*.md``. In
rows without figures the command runs the models at full size.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class KnownModel:
    """One row of ``mlorq models``.

    Attributes:
        family: ``family`` of the ``model`` section.
        model: name or names in the family's library; ``*`` matches anything.
        task: task of the model.
        tested: weights and bit-widths that were run.
        measured: figures on real weights and data; empty if there are none.
        command: command that runs the model, or that measured the figures.
    """

    family: str
    model: str
    task: str
    tested: str
    measured: str = ""
    command: str = ""


IMAGES, TEXTS, PAIRS = "image-classification", "text-classification", "sentence-similarity"
RANDOM = "random weights, tiny sizes, in the tests"
TASKS_TESTED = "tests/models/test_transformers_tasks.py"  # run by pytest
TEXT_TASKS_TESTED = "tests/models/test_text_tasks.py"
CHOICES_TESTED = "tests/models/test_choices.py"
SEQUENCES_TESTED, SPEECH_TESTED = "tests/models/test_encoder_decoder.py", "tests/models/test_speech.py"
WHOLE = "random weights, at full size"


def _run(*names: str) -> str:
    return " ".join(["benchmarks/models.py", *(f"--only {name}" for name in names)])


KNOWN = [
    KnownModel(
        "timm", "vit_tiny_patch16_224", IMAGES, "ImageNet weights and images, 2 to 8 bit; W4/A8, W4/A4, W3/A4",
        "3 bit, preset fast: top-1 0.8114 (float 0.8205), output NMSE 0.0575",
        "benchmarks/table.py benchmarks/real/vit_tiny.yaml --budget 3bit --only fast",
    ),
    KnownModel(
        "timm", "vit_small_*, vit_base_*, vit_large_*", IMAGES, WHOLE, "",
        _run("vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224"),
    ),
    KnownModel(
        "timm", "deit_tiny_*, deit_small_*, deit_base_* (distilled too)", IMAGES, WHOLE, "",
        _run("deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224"),
    ),
    KnownModel(
        "timm", "swin_tiny_*, swin_small_*, swin_base_*", IMAGES, WHOLE, "",
        _run("swin_tiny_patch4_window7_224", "swin_small_patch4_window7_224", "swin_base_patch4_window7_224"),
    ),
    KnownModel(
        "timm", "swinv2_*, eva02_*, hiera_*", IMAGES, f"{WHOLE}; graphs in ONNX", "",
        _run("swinv2_tiny_window8_256", "eva02_tiny_patch14_224", "hiera_tiny_224"),
    ),
    KnownModel("timm", "beit_*", IMAGES, WHOLE, "", _run("beit_base_patch16_224")),
    KnownModel(
        "timm", "*_dinov2, *_dinov3, with features: true", "features of images", f"{WHOLE}; graphs in ONNX", "",
        _run("dinov2_small", "dinov3_small"),
    ),
    KnownModel(
        "timm", "resnet*, convnext_*, mixer_* and others of linear layers and convolutions", IMAGES,
        f"{WHOLE}: ResNet-18, ConvNeXt, a Mixer", "",
        _run("resnet18", "convnext_atto", "convnext_tiny", "mixer_s32_224"),
    ),
    KnownModel(
        "transformers", "BertModel (all-MiniLM-L6-v2)", PAIRS, "real weights on STS-B, 2 to 8 bit",
        "3 bit, tables of 4 bit: Spearman 0.8203 (float 0.8203), output NMSE 0.0259", "make demo",
    ),
    KnownModel(
        "transformers", "MPNetModel (all-mpnet-base-v2)", PAIRS, "real weights on STS-B, 3, 4 and 8 bit",
        "3 bit: Spearman 0.8421 (float 0.8342), output NMSE 0.0817, without reconstruction",
        "benchmarks/table.py benchmarks/real/mpnet.yaml --budget 3bit",
    ),
    KnownModel(
        "transformers", "sentence encoders, with pooling and dense layers of their folder", PAIRS, RANDOM, "",
        _run("minilm"),
    ),
    KnownModel(
        "transformers", "BGE, E5 (BertModel)", PAIRS, f"{WHOLE}; search: {RANDOM}", "", _run("bge_small"),
    ),
    KnownModel(
        "transformers", "BertForSequenceClassification", TEXTS,
        "real weights on SST-2, 2 to 8 bit",
        "2 bit, preset fast: accuracy 0.8704 (float 0.8681), output NMSE 0.0045",
        "benchmarks/table.py benchmarks/real/minilm_sst2.yaml --budget 2bit --only fast",
    ),
    KnownModel(
        "transformers", "BERT of other sizes", TEXTS, WHOLE, "", _run("bert_mini", "bert_base", "bert_large"),
    ),
    KnownModel(
        "transformers", "DistilBertForSequenceClassification", TEXTS, WHOLE, "", _run("distilbert"),
    ),
    KnownModel(
        "transformers", "RobertaForSequenceClassification", TEXTS, WHOLE, "", _run("roberta_small", "roberta_base"),
    ),
    KnownModel(
        "transformers", "any AutoModelForTokenClassification", "token-classification", f"{RANDOM}: BERT", "",
        TEXT_TASKS_TESTED,
    ),
    KnownModel(
        "transformers", "any AutoModelForQuestionAnswering", "question-answering", f"{RANDOM}: BERT", "",
        TEXT_TASKS_TESTED,
    ),
    KnownModel(
        "transformers", "any AutoModelForMultipleChoice", "multiple-choice", f"{RANDOM}: BERT, RoBERTa, ModernBERT", "",
        CHOICES_TESTED,
    ),
    KnownModel(
        "transformers", "any AutoModelForCausalLM", "text-generation", f"{RANDOM}: GPT-2", "", TASKS_TESTED,
    ),
    KnownModel(
        "transformers", "any AutoModelForCausalLM, measured by choices", "text-generation",
        f"{RANDOM}: Qwen3, Llama, GPT-2", "", CHOICES_TESTED,
    ),
    KnownModel(
        "transformers", "LlamaForCausalLM (SmolLM2-135M), Qwen3ForCausalLM (0.6B)", "text-generation",
        f"{WHOLE}: SmolLM2; Qwen3: {RANDOM}", "",
        _run("smollm2_135m", "qwen3_0.6b"),
    ),
    KnownModel(
        "transformers", "ModernBertForMaskedLM", "fill-mask", WHOLE, "", _run("modernbert_base"),
    ),
    KnownModel(
        "transformers", "any AutoModelForMaskedLM", "fill-mask", f"{RANDOM}: BERT", "", TASKS_TESTED,
    ),
    KnownModel(
        "transformers", "any AutoModelForSeq2SeqLM", "text2text-generation", f"{RANDOM}: T5, BART, Marian", "",
        SEQUENCES_TESTED,
    ),
    KnownModel(
        "transformers", "T5ForConditionalGeneration", "text2text-generation", f"{WHOLE}: T5-small", "",
        _run("t5_small"),
    ),
    KnownModel(
        "transformers", "WhisperForConditionalGeneration", "automatic-speech-recognition", f"{WHOLE}: tiny", "",
        _run("whisper_tiny"),
    ),
    KnownModel(
        "transformers", "Wav2Vec2ForCTC", "automatic-speech-recognition", WHOLE, "", _run("wav2vec2_base"),
    ),
    KnownModel(
        "transformers", "any AutoModelForCTC; AutoModelForSpeechSeq2Seq with encoder and decoder",
        "automatic-speech-recognition", f"{RANDOM}: Whisper, Moonshine, wav2vec 2.0, HuBERT", "", SPEECH_TESTED,
    ),
    KnownModel(
        "transformers", "any AutoModelForAudioClassification", "audio-classification",
        f"{RANDOM}: AST, wav2vec 2.0, HuBERT, Whisper's encoder; graphs in ONNX", "", "tests/models/test_sounds.py",
    ),
    KnownModel(
        "transformers", "any AutoModelForImageClassification", IMAGES, f"{RANDOM}: ViT", "", TASKS_TESTED,
    ),
    KnownModel(
        "transformers", "any AutoModel of images", "image-feature-extraction",
        f"{RANDOM}: DINOv2, CLIP's image tower", "", TASKS_TESTED,
    ),
    KnownModel(
        "transformers", "SegformerForSemanticSegmentation", "semantic-segmentation", f"{WHOLE}: B0", "",
        _run("segformer_b0"),
    ),
    KnownModel(
        "transformers", "SegFormer, UperNet, DPT, MobileViT, BEiT for semantic segmentation", "semantic-segmentation",
        f"{RANDOM}; graphs in ONNX", "", "tests/models/test_segmentation.py",
    ),
    KnownModel(
        "transformers", "any AutoModelForDepthEstimation", "depth-estimation",
        f"{RANDOM}: DPT, Depth Anything, GLPN; graphs in ONNX", "", "tests/models/test_depth.py",
    ),
    KnownModel(
        "transformers", "CLIPModel, SiglipModel, Siglip2Model", "zero-shot-image-classification", WHOLE, "",
        _run("clip_vit_base_patch32", "siglip_base_patch16_224", "siglip2_base_patch16_naflex"),
    ),
    KnownModel(
        "transformers", "CLIPModel, SiglipModel, Siglip2Model", "zero-shot-image-classification",
        f"{RANDOM}, both towers; graphs in ONNX", "", "tests/models/test_two_towers.py",
    ),
    KnownModel(
        "transformers", "RTDetrForObjectDetection (R18)", "object-detection", WHOLE, "", _run("rt_detr_r18"),
    ),
    KnownModel(
        "transformers", "DFineForObjectDetection (nano)", "object-detection", WHOLE, "", _run("d_fine_nano"),
    ),
    KnownModel(
        "transformers", "RTDetrForObjectDetection, RTDetrV2ForObjectDetection, DFineForObjectDetection",
        "object-detection", RANDOM, "", "tests/models/test_two_stage_detectors.py",
    ),
    KnownModel(
        "detection", "mask_rcnn_swin_tiny, mask_rcnn_swin_small", "instance-segmentation",
        f"{WHOLE}; both published layouts of checkpoints", "",
        _run("mask_rcnn_swin_tiny", "mask_rcnn_swin_small"),
    ),
    KnownModel(
        "transformers", "DetrForObjectDetection and its like", "object-detection",
        f"{WHOLE}: DETR with ResNet-50", "",
        _run("detr_resnet50"),
    ),
    KnownModel(
        "transformers", "MaskFormer, Mask2Former (Swin and other backbones)", "instance-segmentation",
        f"{WHOLE}: Mask2Former with Swin-T; MaskFormer: {RANDOM}", "",
        _run("mask2former_swin_tiny"),
    ),
    KnownModel(
        "transformers", "SamModel (ViT-B)", "mask-generation", WHOLE, "", _run("sam_vit_base"),
    ),
    KnownModel(
        "transformers", "SamModel, SamHQModel, Sam2Model (images)", "mask-generation",
        f"{RANDOM}, encoder and decoder; graphs in ONNX", "", "tests/models/test_mask_generation.py",
    ),
    KnownModel(
        "custom", "any nn.Module of linear layers and convolutions", "the user's own",
        "a ViT trained on scikit-learn's digits",
        "3 bit, preset fast: accuracy 0.9940 (float 0.9940), NMSE of the logits 8.8e-7",
        "benchmarks/table.py benchmarks/real/vit_digits.yaml --budget 3bit --only fast",
    ),
]  # fmt: skip


def known_models() -> list[dict[str, str]]:
    """The rows of ``mlorq models``: models that are known to work."""
    return [asdict(row) for row in KNOWN]
