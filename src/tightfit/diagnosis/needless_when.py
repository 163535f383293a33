"""Conditions of a run under which a fix has nothing to change, or cannot be taken: for the rules of needless.py."""

import re

from tightfit.diagnosis.failure_case import Case
from tightfit.diagnosis.figure_causes import is_most_of_card
from tightfit.diagnosis.filled_lines import smaller_size
from tightfit.diagnosis.fix_words import words_of
from tightfit.diagnosis.framework_words import has_words, programs
from tightfit.diagnosis.own_options import options_of
from tightfit.diagnosis.purpose import TRAINING
from tightfit.diagnosis.report_words import inputs_of
from tightfit.units import GIB


def has_eval_batch(case: Case) -> bool:
    return case.facts.phase == "eval" and case.shows("switches.eval_batch")


def is_known(case: Case) -> bool:
    return case.program not in (None, "nanogpt")


def has_batch_of_training(case: Case) -> bool:
    """Return True if the program's words for a batch are those of its training, and it keeps nothing for one."""
    return case.keeps_nothing and (is_known(case) or case.evidence.infers) and not case.is_of("share_batch")


def evaluates_in_training(case: Case) -> bool:
    """Return True for an evaluation of an unknown program: its traceback or its user shows that no step failed."""
    shares_batch = case.is_of("share_batch") or case.program == "nanogpt"
    return case.facts.phase == "eval" and not shares_batch


def is_of_pairs_of_one(case: Case) -> bool:
    """Return True for pairs that a program makes picture by picture, with an option to move them to the host."""
    return case.evidence.grows == "pairs" and case.has_own("pairs_on_host")


def has_pairs_of_all(case: Case) -> bool:
    return case.evidence.grows == "pairs" and not is_known(case) and not case.run.numbers.get("batch_size")


def is_of_use_only(case: Case) -> bool:
    """Return True in a training, where a program's words for smaller parts are those of using a trained model."""
    if case.facts.phase in ("eval", "sample") or case.is_of("parts_of_training"):
        return False
    is_training = case.evidence.purpose == TRAINING and not case.evidence.infers
    return is_training and case.has_own("less_at_once") and not options_of("less_at_once", case.run.text)


def has_one_pass(case: Case) -> bool:
    """Return True where one pass cannot be made smaller, as far as its program and its batch tell."""
    evidence, has_parts = case.evidence, case.has_parts
    return (
        not (evidence.infers or evidence.is_of_unknown_purpose or has_parts)
        or (evidence.has_no_smaller_batch and not has_parts)
        or (case.program == "webui" and case.run.numbers.get("batch_size", 1) == 1)
    )


def slides(case: Case) -> bool:
    """Return True if the traceback shows that a picture is looked at in parts, as the program's words would have it."""
    words = words_of("less_at_once", case.evidence)
    return case.calls("slide_inference") and words is not None and any("'slide'" in line for line in words.lines)


_TAKES_GRADIENTS = re.compile(r"(?<![\w.])(?:torch\.)?(?:autograd\.)?grad\((?!\))")
_IN_TEXT = re.compile(r"\bcreate_graph ?= ?True\b|\bautograd\.grad\(")
"""Gradients that a program takes itself, in a failing line and anywhere in a log."""


def is_refused_by_grad(case: Case) -> bool:
    """Return True where gradients are taken by grad(): checkpoint() raises there without use_reentrant=False.

    The lines of most programs do not have it, and PyTorch up to 1.10 does not take it.
    """
    words = words_of("checkpointing_general", case.evidence)
    keeps = words is not None and any("use_reentrant=False" in line for line in words.lines)
    if words is None or (keeps and not case.is_before_reentrant):
        return False
    in_lines = any(_TAKES_GRADIENTS.search(each.source or "") for each in case.facts.frames)
    return in_lines or bool(_IN_TEXT.search(case.run.text))


def recomputes(case: Case) -> bool:
    return case.is_of("checkpoint_always") and not case.shows("switches.recomputes_not")


def encodes_pictures(case: Case) -> bool:
    """Return True where a training of diffusers failed in its autoencoder, which keeps nothing for a backward pass."""
    return case.program == "diffusers" and case.passes_file("autoencoder")


def is_oversized_without_attention(case: Case) -> bool:
    return case.is_oversized and case.evidence.grows != "attention" and not case.may_attend


def is_fused_by_itself(case: Case) -> bool:
    """Return True for a training of one sequence where no line shows attention; an option may turn it on."""
    grows = case.evidence.grows
    return case.evidence.batch_is_one and grows is None and trains(case) and not case.is_of("fused_by_option")


def trains(case: Case) -> bool:
    return case.evidence.trains or case.evidence.purpose == TRAINING


def is_fused(case: Case) -> bool:
    """Return True if attention has a fused kernel: the report names one, and the failing line makes no scores."""
    line = case.evidence.line
    makes_scores = line is not None and line.tensor == "attention_scores"
    return (case.has_sign("flash") and not makes_scores) or case.is_attentions_output


def takes_rows(case: Case) -> bool:
    """Return True if the failing line works on one row of the logits, as older versions of TRL do."""
    return any("logits_row" in (each.source or "") for each in case.facts.frames)


def offloads_activations(case: Case) -> bool:
    """Return True for the optimizer's state in a program whose words for offloading are about activations."""
    words = words_of("offload", case.evidence)
    is_of_activations = words is not None and any("activation_offloading" in line for line in words.lines)
    return is_of_activations and case.evidence.grows == "state"


def decodes_in_tiles(case: Case) -> bool:
    """Return True if an autoencoder failed although it decoded in tiles."""
    return any(re.search(r"(?:de|en)code_tiled|tiled_(?:scale|decode)", each.function) for each in case.facts.frames)


def is_without_fused_attention(case: Case) -> bool:
    """Return True for a family of Transformers' models without a fused attention kernel."""
    return case.run.family in programs("without_fused_attention") or case.is_of("without_fused_attention")


def has_reference(case: Case) -> bool:
    return case.has_sign("preference_pairs") or case.shows("subject.reference_model")


def has_pairs(case: Case) -> bool:
    """Return True for a matrix of pairs, or scores that the program has an option to compute in parts."""
    grows = case.evidence.grows
    return grows == "pairs" or (grows == "attention" and case.has_own("pairs_in_parts"))


def needs_gradients(case: Case) -> bool:
    evidence = case.evidence
    return not (evidence.infers or evidence.is_of_unknown_purpose or case.facts.phase in ("eval", "sample"))


def may_train(case: Case) -> bool:
    """Return True where nothing shows whether the run trains, and nobody says that gradients are kept in vain."""
    is_open = case.evidence.is_of_unknown_purpose and case.facts.phase not in ("eval", "sample")
    return is_open and not case.shows("subject.lacks_no_grad")


def takes_length_in_parts(case: Case) -> bool:
    """Return True if a program uses a trained model, and has words for smaller parts: its option for a long input."""
    return case.evidence.infers and case.facts.phase in (None, "forward", "sample") and case.has_own("less_at_once")


_HALF = ("bfloat16", "float16", "half")
_WORDS_OF_HALF = ("bf16", "fp16", "float16", "16-")


def is_in_half(case: Case) -> bool:
    """Return True if the run works in half precision: by a sign, the failed tensor's dtype, or an option."""
    shape, sized, dtype = case.evidence.shape, case.evidence.sized, case.run.texts.get("dtype", "")
    is_tensor_half = (shape is not None and shape.dtype in _HALF) or is_weight_in_half(case)
    is_tensor_half = is_tensor_half or (sized is not None and sized.dtype == "bfloat16/float16")
    return case.has_sign("half") or is_tensor_half or any(word in dtype for word in _WORDS_OF_HALF)


_SHORT_LENGTH = 256
"""Tokens of a sequence below which a shorter one gives little."""


def has_short_length(case: Case) -> bool:
    return 1 < case.run.numbers.get("length", 0) < _SHORT_LENGTH


def is_of_beams(case: Case) -> bool:
    """Return True for the scores of the next token alone, by their known sizes."""
    sized = case.evidence.sized
    return sized is not None and case.evidence.grows == "logits" and len(sized.shape) == _AXES_OF_BEAMS


_AXES_OF_BEAMS = 2
"""Axes of scores of a beam search: beams, and the vocabulary."""


def takes_sequences(case: Case) -> bool:
    return inputs_of(case.evidence) == "shorter_length"


def is_without_gradients(case: Case) -> bool:
    """Return True if the program turns gradients off, unless the report says that it should."""
    return case.has_sign("no_grad") and not case.shows("subject.lacks_no_grad")


_TURN_OFF = ("transformers/generation/", "transformers/pipelines/", "diffusers/pipelines/", "SentenceTransformer.py")
"""Files with functions that users call, and that turn gradients off themselves."""


def calls_without_gradients(case: Case) -> bool:
    return any(case.passes_file(each) for each in _TURN_OFF) or case.is_of("without_gradients")


def evaluates_without_gradients(case: Case) -> bool:
    return case.facts.phase in ("eval", "gather") and case.is_of("evaluates_without_gradients")


def is_small(case: Case) -> bool:
    """Return True for a family of Transformers' models that is small beside what one pass holds."""
    return case.run.family in programs("small_families")


def only_generates(case: Case) -> bool:
    """Return True where a trained model failed in generation with a batch that the log prints."""
    return case.facts.phase == "sample" and case.evidence.infers and "batch_size" in case.run.numbers


def is_weight_in_half(case: Case) -> bool:
    """Return True if every weight that makes the request is one in 16 bits."""
    fits = case.evidence.fits
    return bool(fits) and all(each.tensor == "weight" and each.dtype == "bfloat16/float16" for each in fits)


def halves(case: Case) -> bool:
    return case.is_of("half_always") and not case.shows("switches.half_off")


def would_embed_in_half(case: Case) -> bool:
    return case.evidence.is_of_unknown_purpose and case.program == "sentence_transformers"


def has_no_offload(case: Case) -> bool:
    """Return True where a program's words for offloading are about another part of its work."""
    evidence, phase = case.evidence, case.facts.phase
    loads = phase in ("load", "setup") and not evidence.trains
    if not ((case.keeps_nothing and (phase != "eval" or evidence.infers)) or loads):
        return case.program == "diffusers"
    words = words_of("offload", evidence)
    of_training = words is not None and any(moves_state(line) for line in words.lines)
    has_words = case.has_own("offload") or options_of("offload", case.run.text)
    return of_training or not has_words or case.shows("versions.before_offload")


_OF_STATE = ("zero_stage", "zerostage", "zero_3", "zero3", "offload_optimizer", "deepspeed", "full_shard")
"""Words of lines that move a training's optimizer state, of which loading a model for its use has none."""


def moves_state(line: str) -> bool:
    return any(word in line.lower() for word in _OF_STATE)


def has_little_to_move(case: Case) -> bool:
    return not (case.has_large_state or case.evidence.infers or case.has_own("offload"))


def swaps_no_blocks(case: Case) -> bool:
    return case.is_of("trainers_of_one") and not case.shows("subject.swapped_blocks")


def keeps_its_precision(case: Case) -> bool:
    """Return True for a training, unless its program stores weights that it does not train in the batch's precision."""
    trains = case.evidence.trains or case.evidence.purpose == TRAINING
    return trains and (not case.is_of("half_frozen") or is_in_half(case))


def has_no_server(case: Case) -> bool:
    return case.is_of("with_servers") and not case.shows("subject.vllm_or_sglang")


def has_no_pixels(case: Case) -> bool:
    return not (case.shows("subject.any_picture_size") or options_of("fewer_pixels", case.run.text))


def has_one_card(case: Case) -> bool:
    return case.run.numbers.get("world_size") == 1


def spreads_over_all(case: Case) -> bool:
    """Return True if the report prints that the model is spread over as many cards as it names."""
    cards = case.run.numbers.get("world_size", case.run.numbers.get("tensor_parallel", 1))
    is_short = case.exceeds_in_parts
    return (
        cards > 1
        and not is_short
        and bool(re.search(rf"tensor[-_]parallel(?:[-_]size)?\W{{1,4}}{cards}\b", case.run.text))
    )


def has_encoders_to_train(case: Case) -> bool:
    """Return True unless adapters are trained for a model with text encoders that can be cached."""
    return not (case.shows("subject.adapters") and case.shows("subject.cached_encoders"))


def freezes_encoders(case: Case) -> bool:
    """Return True where text encoders are not trained, or better leave the card."""
    return case.shows("switches.encoders_frozen") or not has_encoders_to_train(case)


def loads_for_other_trainers(case: Case) -> bool:
    """Return True while weights are loaded, unless the program's training of adapters holds them in 16 bits."""
    return case.facts.phase in ("load", "setup") and case.evidence.grows == "model" and not case.is_of("half_frozen")


_OF_LANGUAGE = re.compile(r"\blm_head\b|CausalLM|\bembed_tokens\b|\bget_peft_model\b|chatglm", re.IGNORECASE)


def has_no_quantizer(case: Case) -> bool:
    """Return True for a program that no table knows, unless its model is one of Transformers' language models."""
    return case.program is None and not _OF_LANGUAGE.search(case.run.text)


def has_other_models(case: Case) -> bool:
    """Return True for models that PEFT and bitsandbytes do not know, or a program that does not take them."""
    if case.program is not None and not case.is_of("libraries"):
        return not case.is_too_large
    return not case.may_be_of_language and not case.is_too_large


def loads_other_models(case: Case) -> bool:
    """Return True while one process loads a model that is small beside a card, as most but those of language are."""
    is_theirs = case.program is None or case.is_of("libraries")
    is_one = case.evidence.is_of_one_process and not case.passes_file("parallel/distributed.py")
    return case.facts.phase in ("load", "setup") and is_theirs and is_one and has_other_models(case)


def encodes_sentences(case: Case) -> bool:
    return case.program == "sentence_transformers" and "Trainer" not in case.run.text


def is_other_without_words(code: str, case: Case) -> bool:
    """Return True for a model of another kind than one of language, in a program without words for the remedy."""
    return has_other_models(case) and not knows(code, case)


def knows(code: str, case: Case) -> bool:
    """Return True for a program with words for a remedy of language models: its own, or those of Transformers."""
    return case.has_own(code) or (has_words(code, case.program or "") and not case.is_of("pictures"))


def has_loop_of_its_own(code: str, case: Case) -> bool:
    """Return True for a program of the tables whose evaluation its users do not write."""
    is_theirs = case.program is None or case.is_of("libraries") or case.is_of("own_evaluation")
    return case.facts.phase == "eval" and not is_theirs and not has_words(code, case.program or "")


def trains_without_quantizer(case: Case) -> bool:
    return case.evidence.trains and not case.has_own("quantized_weights")


def has_small_weights(case: Case) -> bool:
    """Return True for quantised weights, and for a program that uses a model in half precision."""
    is_quantized = case.has_sign("qlora", "four_bit", "quantized_4", "quantized_8")
    return is_quantized or (case.has_sign("half") and case.evidence.infers)


def serves_in_half(case: Case) -> bool:
    return case.program == "vllm" and not case.has_sign("float32")


def is_model_of_user(case: Case) -> bool:
    """Return True for fairseq with a folder of the user's own models, which need not have its switches."""
    return bool(re.search(r"\bcommon\.user_dir=|--user-dir\b", case.run.text))


def draws_for_a_test(case: Case) -> bool:
    """Return True for pictures that a training script of diffusers makes as a test."""
    return case.program == "diffusers" and case.facts.phase == "eval"


def shares_its_batch(case: Case) -> bool:
    """Return True for a program whose evaluation has no batch of its own."""
    return case.is_of("share_batch") and not case.has_own("eval_batch")


def fails_in_amsgrad(case: Case) -> bool:
    return any("max_exp_avg_sq" in (each.source or "") for each in case.facts.frames)


_WITHOUT_LIGER = re.compile(
    r"models[\\/](?:gpt2|gptj|gpt_neo\w*|opt|bloom|falcon|mpt|m?t5|umt5|m?bart|(?:distil|al|camem|de)?bert\w*|(?:xlm_)?roberta|electra|marian|pegasus|codegen)[\\/]"
)
"""Files of models that Liger's kernels leave as they are."""


def has_no_liger(case: Case) -> bool:
    """Return True for a loss by Liger's kernels, which change nothing for this model."""
    words = words_of("chunked_general", case.evidence)
    is_liger = words is not None and any("liger" in line for line in words.lines)
    return is_liger and any(_WITHOUT_LIGER.search(each.file) for each in case.facts.frames)


def asks_for_one(case: Case) -> bool:
    """Return True where the program's only words for less in one pass are a batch of one, which the run has."""
    words = words_of("less_at_once", case.evidence)
    return (
        case.evidence.batch_is_one
        and words is not None
        and all(re.search(r"batch[_-]?size[ =]1\b", line) for line in words.lines)
    )


def has_other_state(case: Case) -> bool:
    """Return True for an optimizer with less state than Adam's, or one that a switch for it leaves in place."""
    words = words_of("optimizer_8bit", case.evidence)
    is_switch = words is not None and "--use_8bit_adam" in words.lines
    return case.shows("subject.other_optimizer") or (is_switch and case.shows("subject.own_optimizer"))


def may_have_no_weights(case: Case) -> bool:
    is_unclear = case.is_foreign or case.evidence.is_of_unknown_purpose
    return is_unclear and not case.is_full_of_its_own


def is_weight_of_unknown(case: Case) -> bool:
    """Return True for a weight that is moved to the card in a program that no table knows."""
    return case.program is None and case.evidence.grows == "model" and case.facts.phase in (None, "load", "setup")


def has_one_model(case: Case) -> bool:
    """Return True unless the program has words for another model, or uses one that the user chose."""
    uses_own = case.evidence.infers and (case.is_too_large or case.program is None)
    sized = case.quantity_without_effect is not None or case.fits_smaller_model
    return not (uses_own or sized or case.has_own("smaller_model") or is_weight_of_unknown(case))


def fills_it_at_once(case: Case) -> bool:
    """Return True for a tensor of an unknown kind that is most of the card, and no weight of the model."""
    is_input = case.evidence.grows is None and case.facts.phase not in ("load", "setup")
    return is_most_of_card(case.facts) and is_input and not case.has_own("smaller_model")


_SMALL_CARD = 6.5 * GIB


def starts_from_nothing(case: Case) -> bool:
    return case.program == "nanogpt" and not case.shows("subject.starts_from_gpt2")


def has_other_size(case: Case) -> bool:
    """Return True for models of several sizes, unless neither the batch nor the card leaves much else."""
    if not case.is_of("sized_models"):
        return False
    is_last = case.evidence.batch_is_one or 0 < (case.facts.total_bytes or 0) < _SMALL_CARD
    return not is_last or smaller_size(case.run.text) is None


def has_no_words(code: str, case: Case) -> bool:
    """Return True for a program of the tables that PyTorch's own lines for a remedy are foreign to."""
    is_known = case.program is not None and not case.is_of("libraries") and not case.is_too_large
    return is_known and not has_words(code, case.program or "")


def loads_for_adapters(case: Case) -> bool:
    """Return True while one process of a program of one's own loads a model for a training of adapters."""
    is_one = case.program is None and case.evidence.is_of_one_process
    return is_one and case.facts.phase in ("load", "setup") and "get_peft_model" in case.run.text


def loads_for_use(case: Case) -> bool:
    """Return True while a model is loaded, where the log shows no training."""
    return case.facts.phase == "load" and case.evidence.purpose != TRAINING and not case.evidence.trains


def may_train_nothing(case: Case) -> bool:
    """Return True if a program uses a trained model, or an unknown one loads weights and shows no training."""
    evidence = case.evidence
    is_shown = case.program is not None or evidence.trains or evidence.purpose == TRAINING
    return evidence.infers or (evidence.grows == "model" and not is_shown)


def evaluates_one(case: Case) -> bool:
    """Return True for a report of an unknown program's evaluation that says that the batch is one."""
    is_one = case.evidence.batch_is_one or case.has_sign("eval_batch_at_floor")
    return case.facts.phase == "eval" and case.program is None and is_one


_BROADCAST = re.compile(r"unsqueeze\(|\bNone\b")


def source(case: Case) -> str:
    """Return the line of code that shows the tensor; empty if none does."""
    line = case.evidence.line
    return line.frame.source or "" if line is not None else ""


def broadcasts(case: Case) -> bool:
    """Return True for a line that makes all pairs by a broadcast of vectors."""
    return bool(_BROADCAST.search(source(case))) and not _OF_BOXES.search(source(case))


def pairs_items(case: Case) -> bool:
    """Return True for pairs of items, such as nodes or embeddings, rather than of boxes or places of a picture."""
    is_of_places = _OF_BOXES.search(source(case)) or _CORRELATES.search(source(case))
    return case.evidence.grows == "pairs" and not is_of_places


_CORRELATES = re.compile(r"\bcorr|anchor|assign|gt_|pixel|points?\b|xyz", re.IGNORECASE)
"""Words of lines that compare places of a picture or a scene."""


_OF_BOXES = re.compile(r"iou|overlap|area|box|\bmax\(|\bmin\(|clamp", re.IGNORECASE)
"""Words of lines on the overlap of boxes, which no product of matrices gives."""


def fails_in_foreach(case: Case) -> bool:
    return any("foreach" in f"{each.source} {each.function}" for each in case.facts.frames[-2:])
