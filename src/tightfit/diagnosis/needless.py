"""Fixes that are needless here: the run has them already, or they cannot help. A new rule is an entry of a table."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from tightfit.diagnosis import needless_when as when
from tightfit.diagnosis.failure_case import Case


class _Rule(NamedTuple):
    """A reason to leave a remedy out."""

    code: str
    reason: str
    holds: Callable[[Case], bool]


_OF_THE_PASS = (
    _Rule("vae_in_tiles", "it decodes in tiles already", when.decodes_in_tiles),
    _Rule("vae_on_host", "it may decode in tiles", lambda case: not when.decodes_in_tiles(case)),
    _Rule("quantized_weights", "quantising is what it does", lambda case: case.is_of("quantizers")),
    _Rule("quantized_weights", "the picture is being decoded", when.decodes_in_tiles),
    _Rule("vae_in_tiles", "another part failed", lambda case: case.is_of("with_vae") and not case.shows_vae),
    _Rule("split_general", "the batch is one already", lambda case: case.evidence.has_no_smaller_batch),
    _Rule("loss_inside", "no outputs are gathered", lambda case: case.evidence.tensor != "gathered_outputs"),
    _Rule("half_precision", "Unsloth does it by itself", lambda case: case.program == "unsloth"),
    _Rule("half_precision", "outputs are gathered", lambda case: case.evidence.tensor == "gathered_outputs"),
    _Rule("split_general", "the pairs are of one picture", when.is_of_pairs_of_one),
    _Rule("split_general", "one item is taken at a time", lambda case: case.takes_one_item),
    _Rule("eval_batch", "one item is taken at a time", lambda case: case.takes_one_item),
    _Rule("split_general", "the program has no batch", lambda case: case.is_of("without_batch")),
    _Rule("split_general", "an evaluation has a batch of its own", when.has_eval_batch),
    _Rule("split_general", "the program trains with another batch", when.has_batch_of_training),
    _Rule("split_general", "no step of the training failed", when.evaluates_in_training),
    _Rule("split_general", "one sequence is too large", lambda case: case.is_oversized and not case.batch_would_do),
    _Rule("split_general", "nothing shows a training", lambda case: case.evidence.is_of_unknown_purpose),
    _Rule("split_general", "pairs are of all items, without a batch", when.has_pairs_of_all),
    _Rule("less_at_once", "the words are for the use of a model", when.is_of_use_only),
    _Rule("less_at_once", "one pass cannot be smaller", when.has_one_pass),
    _Rule("less_at_once", "the batch is one already", when.asks_for_one),
    _Rule("less_at_once", "a picture is taken in parts already", when.slides),
    _Rule("split_general", "the optimizer makes its state", lambda case: case.makes_optimizer_state),
    _Rule("checkpointing_general", "the optimizer makes its state", lambda case: case.makes_optimizer_state),
    _Rule("checkpointing_general", "nothing is kept for a backward pass", lambda case: case.keeps_nothing),
    _Rule("checkpointing_general", "grad() refuses it", when.is_refused_by_grad),
    _Rule("checkpointing_general", "it is on", lambda case: case.has_sign("checkpointing")),
    _Rule("checkpointing_general", "it is on", lambda case: case.passes_file("torch/utils/checkpoint")),
    _Rule("checkpointing_general", "the program does it by itself", when.recomputes),
    _Rule("checkpointing_general", "a model of the user's own may lack it", when.is_model_of_user),
    _Rule("checkpointing_general", "the frozen encoder keeps nothing", when.encodes_pictures),
    _Rule("checkpointing_general", "nothing shows a training", lambda case: case.evidence.is_of_unknown_purpose),
    _Rule("fused_kernel", "the line is of something else", lambda case: not case.is_attentions_output),
    _Rule("fused_attention", "the picture is being decoded", lambda case: case.passes_file("autoencoder")),
    _Rule("fused_attention", "it is on", when.is_fused),
    _Rule("fused_attention", "the model has none", when.is_without_fused_attention),
    _Rule("fused_attention", "it is on by itself", when.is_fused_by_itself),
    _Rule("fused_attention", "scores are small", lambda case: case.has_small_scores and not case.is_oversized),
    _Rule("fused_attention", "the pairs are not of attention", lambda case: case.evidence.grows == "pairs"),
    _Rule("fused_attention", "nothing shows attention", when.is_oversized_without_attention),
    _Rule("eval_batch", "it is one", lambda case: case.is_of("evaluate_one")),
    _Rule("eval_batch", "the report says that it is one", when.evaluates_one),
    _Rule("eval_batch", "nothing is evaluated", when.only_generates),
    _Rule("eval_batch", "a trained model is used", lambda case: case.evidence.infers and case.facts.phase != "eval"),
    _Rule("smaller_cache", "the cache has room", lambda case: case.shows("subject.cache_has_room")),
    _Rule("reference_first", "there is no reference model", lambda case: not when.has_reference(case)),
    _Rule("no_gradients", "the program turns them off", when.evaluates_without_gradients),
    _Rule("no_gradients", "they are off", when.is_without_gradients),
    _Rule("no_gradients", "the library's function turns them off", when.calls_without_gradients),
    _Rule("no_gradients", "the code is not the user's", lambda case: case.is_foreign),
    _Rule("no_gradients", "a training needs them", when.needs_gradients),
    _Rule("no_gradients", "it may be a training", when.may_train),
    _Rule("shorter_length", "a length is worked on in parts", when.takes_length_in_parts),
    _Rule("shapes_first", "the sizes are known", lambda case: case.evidence.sized is not None),
    _Rule("shorter_length", "it is short", when.has_short_length),
    _Rule("shorter_length", "the tensor holds one token of each beam", when.is_of_beams),
    _Rule("smaller_inputs", "the tensor holds one token of each beam", when.is_of_beams),
    _Rule("smaller_inputs", "the pairs are not of places", when.pairs_items),
    _Rule("smaller_inputs", "they are short", lambda case: when.has_short_length(case) and when.takes_sequences(case)),
    _Rule("chunked_general", "the kernels do not know this model", when.has_no_liger),
    _Rule("less_at_once", "it is of the whole graph", lambda case: case.evidence.tensor == "dense_adjacency"),
    _Rule("offload", "it is of activations", when.offloads_activations),
    _Rule("share_of_card", "its limit is too low as it is", lambda case: case.is_below_limit),
    _Rule("smaller_inputs", "recordings are padded to 30 seconds", lambda case: case.passes_file("models/whisper/")),
    _Rule("no_gradients", "forces are gradients of the energy", lambda case: case.program == "mace"),
    _Rule("chunked_general", "rows are taken one by one", when.takes_rows),
    _Rule("chunked_general", "the program's own loss is in chunks", lambda case: case.is_of("chunked_loss")),
    _Rule("half_precision", "it is on", when.is_in_half),
    _Rule("half_precision", "the program does it by itself", when.halves),
    _Rule("half_precision", "PyTorch is too old", lambda case: case.is_before("half_precision")),
    _Rule("half_precision", "its words are for a training", when.would_embed_in_half),
    _Rule("pairs_in_parts", "there are no pairs", lambda case: not when.has_pairs(case)),
    _Rule("pairs_in_parts", "the program has a place for pairs", lambda case: case.has_own("pairs_on_host")),
    _Rule("pairs_as_product", "no broadcast makes them", lambda case: not when.broadcasts(case)),
    _Rule("release_logits", "no loss is estimated", lambda case: not case.calls("estimate_loss")),
)
"""Remedies of memory that one pass holds."""

_OF_THE_MODEL = (
    _Rule("offload", "nothing can be moved", when.has_no_offload),
    _Rule("offload", "ZeRO takes no 4-bit weights", lambda case: case.adapts_quantized and not case.evidence.infers),
    _Rule("offload", "Unsloth does it by itself", lambda case: case.evidence.trains and case.program == "unsloth"),
    _Rule("offload", "PyTorch is too old", lambda case: case.is_before("offload")),
    _Rule("offload", "the model's blocks cannot be swapped", when.swaps_no_blocks),
    _Rule("offload", "the state is small", when.has_little_to_move),
    _Rule("save_from_host", "one process saves", lambda case: case.evidence.is_of_one_process),
    _Rule("save_sharded", "one process saves", lambda case: case.evidence.is_of_one_process),
    _Rule("save_on_host", "several processes save", lambda case: not case.evidence.is_of_one_process),
    _Rule("save_on_host", "only adapters are saved", lambda case: case.adapts),
    _Rule("save_on_host", "8-bit weights are rearranged first", lambda case: case.passes_file("bitsandbytes")),
    _Rule("save_adapters", "there are none", lambda case: not case.adapts),
    _Rule("save_adapters", "several processes save", lambda case: not case.evidence.is_of_one_process),
    _Rule("save_adapters", "8-bit weights are rearranged first", lambda case: case.passes_file("bitsandbytes")),
    _Rule("built_divided", "Lightning builds none", lambda case: not case.calls("_configure_distributed_model")),
    _Rule("built_divided", "ZeRO's stage is not 3", lambda case: case.run.numbers.get("zero_stage") != 3),
    _Rule("no_reserve", "nothing is reserved", lambda case: not case.shows("switches.reserves")),
    _Rule("share_of_card", "no server runs beside the training", when.has_no_server),
    _Rule("fewer_pixels", "the model takes no pictures of any size", when.has_no_pixels),
    _Rule("lora", "the weights stay as they are", when.loads_for_other_trainers),
    _Rule("lora", "adapters are trained already", lambda case: case.adapts or case.trains_part),
    _Rule("lora", "PyTorch is older than PEFT", lambda case: case.is_before("lora")),
    *(
        _Rule(code, "the model is not one of language", partial(when.is_other_without_words, code))
        for code in ("lora", "qlora", "quantized_weights", "spread_model")
    ),
    _Rule("text_encoder_first", "the text encoders stay", when.has_encoders_to_train),
    _Rule("encoders_frozen", "they are, or can be cached", when.freezes_encoders),
    _Rule("shard_quantized", "the weights are not in 4 bits", lambda case: not case.adapts_quantized),
    _Rule("shard_quantized", "nothing is trained", lambda case: case.evidence.infers),
    _Rule("shard_quantized", "there is one card", when.has_one_card),
    _Rule("fewer_trained", "all or hardly any are trained", lambda case: not case.trains_part),
    _Rule("qlora", "it is on", lambda case: case.adapts_quantized),
    _Rule("qlora", "PyTorch is older than PEFT", lambda case: case.is_before("qlora")),
    _Rule("quantized_weights", "they are", lambda case: case.has_sign("qlora", "four_bit", "quantized_4")),
    _Rule(
        "quantized_weights",
        "they are, in the precision that the program has words for",
        lambda case: case.is_of("quantize_to_8") and case.has_sign("quantized_8"),
    ),
    _Rule("quantized_weights", "a training needs words for it", when.trains_without_quantizer),
    _Rule("smaller_weights", "a training needs its precision", when.keeps_its_precision),
    _Rule(
        "smaller_weights",
        "a server keeps 16 bits by itself",
        when.serves_in_half,
    ),
    _Rule("smaller_weights", "they are small", when.has_small_weights),
    _Rule("smaller_weights", "they are small, by the report", lambda case: case.has_sign("small_weights")),
    _Rule("quantized_weights", "they are small, by the report", lambda case: case.has_sign("small_weights")),
    _Rule("spread_model", "they are small, by the report", lambda case: case.has_sign("small_weights")),
    _Rule("quantized_weights", "no library of language models is shown", when.has_no_quantizer),
    _Rule("spread_model", "no library of language models is shown", when.has_no_quantizer),
    _Rule("spread_model", "a trainer divides it by itself", lambda case: case.evidence.trains),
    _Rule("quantized_weights", "the model is small", when.is_small),
    _Rule("spread_model", "the model is small", when.is_small),
    _Rule("smaller_weights", "they have 4 bits", lambda case: case.adapts_quantized),
    _Rule("less_at_once", "the results are of the whole input", lambda case: case.evidence.grows == "windows"),
    _Rule("eval_batch", "the program evaluates", lambda case: when.has_loop_of_its_own("eval_batch", case)),
    _Rule("outputs_to_host", "the program evaluates", lambda case: when.has_loop_of_its_own("outputs_to_host", case)),
    _Rule(
        "eval_batch",
        "it is that of the training",
        lambda case: case.is_of("share_batch") and not case.has_own("eval_batch"),
    ),
    _Rule("eval_batch", "the outputs of all batches are joined", lambda case: case.evidence.grows == "outputs"),
    _Rule("eval_batch", "the results are of the whole input", lambda case: case.evidence.grows == "windows"),
    _Rule("smaller_weights", "they have 16 bits", when.is_weight_in_half),
    _Rule("smaller_weights", "the run works in 16 bits", when.is_in_half),
    _Rule("smaller_weights", "the weights are not the user's", when.may_have_no_weights),
    _Rule("smaller_model", "the program has one model", when.has_one_model),
    _Rule("smaller_model", "the run starts from no weights", when.starts_from_nothing),
    _Rule("smaller_model", "one request for its inputs is most of the card", when.fills_it_at_once),
    _Rule("smaller_model", "a smaller batch comes first, or it is the smallest", when.has_other_size),
    _Rule("smaller_picture", "the pairs are not of places", when.pairs_items),
    _Rule("smaller_picture", "the option is of the training", when.draws_for_a_test),
    _Rule(
        "smaller_picture", "a window's size is not that of the results", lambda case: case.evidence.grows == "windows"
    ),
    _Rule("outputs_reduced", "no trainer evaluates", when.encodes_sentences),
    _Rule("outputs_dropped", "no trainer evaluates", when.encodes_sentences),
    _Rule("outputs_generated", "no trainer evaluates", when.encodes_sentences),
    _Rule("outputs_reduced", "the program has metrics of its own", lambda case: case.is_of("own_metrics")),
    _Rule("outputs_dropped", "metrics are wanted", lambda case: "compute_metrics" in case.run.text),
    _Rule("outputs_dropped", "the program has metrics of its own", lambda case: case.is_of("own_metrics")),
    _Rule("outputs_to_host", "the loop keeps losses only", lambda case: case.calls("estimate_loss")),
    _Rule("outputs_to_host", "the program does not pass it on", lambda case: case.program == "axolotl"),
    _Rule("outputs_generated", "the trainer has no generation", lambda case: case.shows("subject.causal_trainer")),
    _Rule("spread_model", "it is on, over all cards", when.spreads_over_all),
    _Rule(
        "shard", "it is on", lambda case: case.passes_file("zero/stage3") or case.passes_file("partition_parameters")
    ),
    _Rule("shard", "it is on", lambda case: case.run.numbers.get("zero_stage") == 3 or case.has_sign("full_shard")),
    _Rule("shard", "ZeRO takes no 4-bit weights", lambda case: case.adapts_quantized),
    _Rule("shard", "Unsloth is for one card", lambda case: case.program == "unsloth"),
    _Rule("shard", "there is one card", when.has_one_card),
    _Rule("save_from_host", "it is FSDP's", lambda case: case.passes_file("deepspeed/")),
    _Rule("shard", "the shards are gathered", lambda case: case.evidence.tensor == "gathered_parameters"),
    _Rule("shard", "the program has no words for it", lambda case: when.has_no_words("shard", case)),
    _Rule("offload", "the program has no words for it", lambda case: when.has_no_words("offload", case)),
    _Rule("shard", "nothing is trained", when.may_train_nothing),
    _Rule("shard", "the model is not one of language", when.loads_other_models),
    _Rule("shard", "a model is loaded, and no training is shown", when.loads_for_use),
    _Rule("shard", "one process loads a model for its adapters", when.loads_for_adapters),
    _Rule("optimizer_foreach", "another line failed", lambda case: not when.fails_in_foreach(case)),
    _Rule("optimizer_8bit", "it is on", lambda case: case.passes_file("bitsandbytes/optim")),
    _Rule("optimizer_8bit", "SGD has no such form that users know", lambda case: case.passes_file("torch/optim/sgd")),
    _Rule("optimizer_paged", "it is none of bitsandbytes", lambda case: not case.passes_file("bitsandbytes/optim")),
    _Rule("no_amsgrad", "it is off", lambda case: not when.fails_in_amsgrad(case)),
    _Rule("no_momentum", "another optimizer failed", lambda case: not case.passes_file("torch/optim/sgd")),
    _Rule("optimizer_8bit", "it is on", lambda case: "8bit" in case.run.texts.get("optimizer", "").lower()),
    _Rule("optimizer_8bit", "it is on", lambda case: case.shows("switches.adam_8bit")),
    _Rule("optimizer_8bit", "PyTorch is older than 8-bit optimizers", lambda case: case.is_before("optimizer_8bit")),
    _Rule("optimizer_8bit", "its state is not Adam's", when.has_other_state),
    _Rule("optimizer_8bit", "its state is on the host", lambda case: case.shows("switches.optimizer_on_host")),
    _Rule("optimizer_8bit", "adapters have hardly any", lambda case: case.adapts),
    _Rule("offload", "it is on", lambda case: case.shows("switches.all_on_host")),
    _Rule("optimizer_8bit", "the state is small", lambda case: not case.has_large_state),
)
"""Remedies of weights and optimizer state."""


def needless(case: Case) -> frozenset[str]:
    """Return the remedies that a rule leaves out."""
    found = {rule.code for rule in (*_OF_THE_PASS, *_OF_THE_MODEL) if rule.holds(case)}
    return frozenset(found | {each for code in case.without_effect for each in (code, *_WITH.get(code, ()))})


_WITH = {
    "split_general": ("less_at_once",),
    "smaller_picture": ("smaller_inputs",),
    "shorter_length": ("smaller_inputs",),
}
"""Remedies under other words for a quantity that by the report changes nothing."""
