# ruff: noqa: E501 - messages and configurations stand here as they are printed
"""The tables behind an explanation: models, kinds of lines, sizes of requests, words of programs."""

import json
from pathlib import Path

import pytest

from tightfit.cli.main import main
from tightfit.diagnosis import model_play
from tightfit.diagnosis.evidence import evidence_of
from tightfit.diagnosis.explaining import explain
from tightfit.diagnosis.failing_line import line_kind
from tightfit.diagnosis.framework_words import frameworks, pasted, programs
from tightfit.diagnosis.own_options import options_of
from tightfit.diagnosis.printed_config import printed_config
from tightfit.diagnosis.tensor_fits import range_of, usual_weights
from tightfit.diagnosis.usual_models import model_of, usual_models
from tightfit.oomlog.facts import Facts, Figure
from tightfit.oomlog.printed import printed_in
from tightfit.oomlog.run_facts import run_facts_in
from tightfit.oomlog.tracebacks import TraceFrame
from tightfit.units import MIB

DECODERS = [model for _, model in usual_models() if model.kind == "causal" and model.hidden]


@pytest.mark.parametrize("model", DECODERS, ids=[model.name for model in DECODERS])
def test_the_large_matrices_of_a_decoder_are_nearly_all_of_its_parameters(model):
    """What is missing are norms and biases, and learned positions in GPT-2."""
    assert model.counted == pytest.approx(model.parameters, rel=0.008)
    assert model.counted < model.parameters


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("meta-llama/Llama-2-7b-hf", "Llama 2 7B"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "Llama 3 8B"),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "Qwen2.5 7B"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "Mistral 7B v0.3"),
        ("openai-community/gpt2", "GPT-2"),
        ("gpt2-xl", "GPT-2 XL"),
        ("google-t5/t5-base", "T5 base"),
        ("flan-t5-base", None),
        ("distilgpt2", None),
        ("xlm-roberta-large", None),
        ("Qwen/Qwen2.5-VL-7B-Instruct", "Qwen2.5-VL 7B"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "Mixtral 8x7B"),
    ],
)
def test_a_model_is_known_by_its_name(name: str, found: str | None):
    model = model_of(run_facts_in(f"python train.py --model_name_or_path {name} --epochs 3"))
    assert (model.name if model and not model.is_by_name else None) == found


def test_billions_in_a_name_are_not_the_blocks_of_a_network():
    for text, billions in (("gpt2(2.6B) with mp=2 dp=8", 2.6), ("--name RealESRGAN_x4plus_anime_6B.pth", None)):
        model = model_of(run_facts_in(text))
        assert (model.parameters if model else None) == (billions * 10**9 if billions else None)


def test_two_models_in_a_text_are_none():
    assert model_of(run_facts_in("llama-2-7b works, llama-2-13b does not")) is None
    model = model_of(run_facts_in("llama-2-13b does not fit"))
    assert model is not None
    assert model.parameters == 13_015_864_320


def test_a_request_stands_for_a_range_of_sizes():
    for text, low, high in (("136.00 MiB", 134 * MIB + 1, 136 * MIB), ("20.00 MiB", MIB + 1, 20 * MIB)):
        figure = Figure.printed(text)
        assert figure is not None
        assert (range_of(figure).low, range_of(figure).high) == (low, high)
    assert range_of(Figure(bytes=2 * MIB, low=2 * MIB - 5000, high=2 * MIB + 5000)).is_small


def test_weights_of_a_size():
    figure = Figure.printed("86.00 MiB")
    assert figure is not None
    found = {(fit.shape, fit.dtype): fit.models for fit in usual_weights(range_of(figure))}
    assert "Llama 2 7B" in found[(4096, 11008), "bfloat16/float16"]
    assert "Qwen2.5 3B" in found[(2048, 11008), "float32"]


@pytest.mark.parametrize(
    ("file", "function", "source", "tensor"),
    [
        ("/x/torch/nn/modules/module.py", "convert", "return t.to(", "converted_weight"),
        ("/x/torch/optim/adam.py", "_init_group", "state['exp_avg_sq'] = torch.zeros_like(", "optimizer_moment"),
        ("/x/torch/optim/adamw.py", "_multi_tensor_adamw", "torch._foreach_sqrt(x)", "optimizer_temporary"),
        ("/x/torch/serialization.py", "_cuda", "return obj.cuda(device)", "checkpoint_loaded"),
        ("/x/torch/nn/parallel/comm.py", "gather", "return torch._C._gather(tensors, dim)", "gathered_outputs"),
        ("/x/torch/nn/modules/conv.py", "_conv_forward", "return F.conv3d(", "convolution"),
        ("/x/model.py", "forward", "attn = q @ k.transpose(-2, -1)", "attention_scores"),
        ("/x/model.py", "forward", "logits = self.lm_head(x)", "logits"),
        ("/x/train.py", "<module>", "model = model.to(device)", "moved_model"),
        ("/x/train.py", "<module>", "total = a + b", None),
        ("/x/torch/autograd/graph.py", "_engine_run_backward", "return Variable._execution_engine.run_backward(", None),
    ],
)
def test_a_line_shows_its_kind_of_tensor(file: str, function: str, source: str, tensor: str | None):
    frames = [
        TraceFrame(file="/x/main.py", line=3, function="<module>", source="main()"),
        TraceFrame(file=file, line=10, function=function, source=source),
    ]
    found = line_kind(frames)
    assert (found.tensor if found else None) == tensor


def test_every_program_divides_its_batch_in_words_of_its_own():
    without_batch = {"gaussian_splatting", "transformers", "ray", "fsdp", "dreambooth_extension", "stable_diffusion"}
    without_batch |= programs("servers") | programs("without_batch")
    for program in set(frameworks()) - without_batch - {"unsloth", "trl", "pytorch"}:
        found = pasted("split_general", [program], {"size": 2, "passes": 8, "half": 512})
        assert found is not None
        assert "{" not in "".join(found.lines), program
        assert found.page or program == "jax", program
    assert pasted("split_general", ["jax"], {"size": 2, "passes": 8, "half": 4}) is not None
    assert pasted("expandable_segments", ["jax"], {}) is None, "PyTorch's setting is not JAX's"


# Configurations of other programs

LOG = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 136.00 MiB. GPU 3 has a total capacity of 39.39 GiB of "
    "which 101.06 MiB is free.\n"
)
AXOLOTL = (
    "base_model: meta-llama/Llama-3.1-8B\nmicro_batch_size: 2\ngradient_accumulation_steps: 4\nsequence_len: 8192\n"
)
DEEPSPEED = '{"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 3}}\n'
ARGUMENTS = "per_device_train_batch_size = 4\ngradient_accumulation_steps = 100\n"
MODEL = (
    '{"architectures": ["Qwen2ForCausalLM"], "hidden_size": 5120, "intermediate_size": 13824, "vocab_size": 152064}\n'
)


@pytest.mark.parametrize(
    ("name", "text", "says", "says_ja"),
    [
        (
            "axolotl.yaml",
            AXOLOTL,
            ["read as axolotl's: batch 2, accumulation 4, 8192 tokens, Llama 3 8B", "59.83 GiB", "adapter: qlora"],
            ["「axolotl の設定」として読みました", "バッチ 2、勾配累積 4、8192 トークン"],
        ),
        (
            "ds.json",
            DEEPSPEED,
            [
                "read as DeepSpeed's: batch 4, ZeRO stage 3",
                "The model is not known",
                '"train_micro_batch_size_per_gpu": 1',
            ],
            ["「DeepSpeed の設定」として読みました", "モデルが不明"],
        ),
        (
            "arguments.py",
            ARGUMENTS,
            ["Hugging Face's TrainingArguments: batch 4, accumulation 100", "gradient_accumulation_steps=400"],
            ["Hugging Face の TrainingArguments」として読みました"],
        ),
        ("config.json", MODEL, ["a model's config.json: Qwen2.5 14B"], ["「モデルの config.json」として読みました"]),
    ],
)
def test_a_configuration_of_another_program_is_read(
    name: str,
    text: str,
    says: list[str],
    says_ja: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(model_play, "can_play", lambda: False)
    log, config = tmp_path / "oom.log", tmp_path / name
    log.write_text(LOG)
    config.write_text(text)
    for language, parts in (("en", says), ("ja", says_ja)):
        assert main(["explain", str(log), "--config", str(config), f"--lang={language}", "--verbose"]) == 0
        printed = "".join(capsys.readouterr().out.split())
        for part in parts:
            assert "".join(part.split()) in printed
        assert "GPT-2" not in printed


def test_keys_of_another_program_are_read_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    log = tmp_path / "oom.log"
    log.write_text(LOG)
    keys = ["--per_device_train_batch_size=4", "--gradient_accumulation_steps=100"]
    assert main(["explain", str(log), *keys, "--lang=en"]) == 0
    assert "per_device_train_batch_size=1\n      gradient_accumulation_steps=400" in capsys.readouterr().out


def test_a_code_has_its_page_on_the_command_line(capsys: pytest.CaptureFixture[str]):
    assert main(["explain", "--code", "TF-105", "--lang=en"]) == 0
    assert capsys.readouterr().out.startswith("TF-105: outputs of an evaluation kept on the card")
    assert main(["explain", "--code=TF-999", "--lang=en"]) == 2
    assert (
        capsys.readouterr().err
        == "tightfit: 'TF-999' is not a code; codes are written TF-101 and stand behind each cause\n"
    )


@pytest.mark.parametrize(
    ("code", "text", "lines"),
    [
        ("coarser_points", "voxel_size: 0.05", ("voxel_size: 0.1",)),
        ("smaller_picture", "img_size: [512, 512]", ("img_size: [256, 256]",)),
        ("smaller_picture", "--resolution 720p", ("--resolution 480p",)),
        ("smaller_picture", "--video-size 128 128", ()),
        ("smaller_inputs", "--max-duration = 750 , 600", ("--max-duration = 375",)),
        ("shorter_length", "MAX_SEQUENCE_LENGTH = 256", ("MAX_SEQUENCE_LENGTH = 128",)),
        ("shorter_length", "python train.py data.max_length=1024", ("data.max_length=512",)),
        ("less_at_once", "--num_minibatches=4", ("--num_minibatches=8",)),
        ("less_at_once", "'chunk': 4096", ()),
    ],
)
def test_options_that_a_report_prints(code: str, text: str, lines: tuple[str, ...]):
    assert options_of(code, text) == lines


def test_smaller_parts_of_a_batch_are_not_exact_with_batch_normalisation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    log = tmp_path / "run.log"
    log.write_text(
        "Traceback (most recent call last):\n"
        '  File "train.py", line 22, in forward\n    x = self.bn2(self.conv2(x))\n'
        '  File "/site-packages/torch/nn/functional.py", line 2822, in batch_norm\n    return torch.batch_norm(\n'
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 784.00 MiB. GPU 0 has a total capacity of "
        "11.69 GiB of which 514.00 MiB is free.\n"
    )
    assert main(["explain", str(log), "--json", "--lang=en"]) == 0
    fixes = json.loads(capsys.readouterr().out)["remedies"]
    found = [each["applicability"] for each in fixes if each["code"].startswith("split")]
    assert found == ["changes_result"]


FULL = "RuntimeError: CUDA out of memory. Tried to allocate 34.00 MiB (GPU 0; 10.91 GiB total capacity; 9.97 GiB already allocated; 17.56 MiB free; 10.20 GiB reserved in total by PyTorch)"


@pytest.mark.parametrize(
    ("title", "code"),
    [
        ("training a ResNet-50 on CIFAR", "smaller_picture"),
        ("语义分割训练", "smaller_picture"),
        ("finetune chatglm", "shorter_length"),
        ("RLHF of a Llama-2 model with PPO: training fails", "shorter_length"),
        ("training wav2vec2 on librispeech", "shorter_audio"),
        ("声学模型训练", "shorter_audio"),
        ("training PointPillars on KITTI", "coarser_points"),
        ("training with a patch of 128x128x128", "smaller_volumes"),
        ("training of Auto3D", "smaller_volumes"),
        ("training BERT4Rec and a ResNet together", "smaller_inputs"),
        ("training fails", "smaller_inputs"),
    ],
)
def test_names_of_models_and_data_show_which_inputs_can_be_smaller(title: str, code: str):
    codes = [each.code for each in explain(f"# {title}\n{FULL}").remedies]
    kinds = {
        "smaller_volumes",
        "smaller_picture",
        "shorter_length",
        "shorter_audio",
        "coarser_points",
        "smaller_inputs",
    }
    assert [each for each in codes if each in kinds] == [code]


@pytest.mark.parametrize(
    ("words", "is_told"),
    [
        ("It trains with a loss of 0.3, but fails after 4.5k iterations.", True),
        ("The training survives the first epoch and stops at the second epoch.", True),
        ("It backpropagates the loss for some batches, but then it fails.", True),
        ("训练到了第4轮就报错", True),
        ("学習は 3 エポック目で落ちます。", True),
        ("The training fails in step 1.", False),
        ("I train for 100 epochs with Adam.", False),
    ],
)
def test_steps_before_the_failure_had_room(words: str, is_told: bool):
    assert ("ran_first" in [each.code for each in explain(f"# training fails\n{words}\n{FULL}").causes]) == is_told


@pytest.mark.parametrize(
    ("words", "phase"),
    [
        ("Training goes well, but it fails in the evaluation step.", "eval"),
        ("I've successfully run the training process, but encountered a problem during evaluation.", "eval"),
        ("train is ok, test is oom", "eval"),
        ("训练完成一轮后验证时报错", "eval"),
        ("1エポック学習後の検証でOOMになってしまいます。", "eval"),
        ("훈련은 정상적으로 되지만 평가 단계에서 오류가 납니다.", "eval"),
        ("Training funktioniert, bei der Evaluierung kommt dann der Fehler.", "eval"),
        ("I resume a run. It proceeds without issues until the point when a new checkpoint is saved.", "save"),
        ("It crashes when the model is being saved after epoch 1.", "save"),
        ("체크포인트에서 학습을 재개하면 오류가 납니다.", "resume"),
        ("Evaluation is fine, but training runs out of memory.", None),
        ("评估没有问题，但是训练的时候爆显存", None),
        ("評価は問題なくできますが、学習時にメモリ不足になります。", None),
        ("Testing shows that the batch size does not matter, it is always out of memory.", None),
        ("It fails with OOM on the validation csv of my preprocessing.", None),
    ],
)
def test_a_report_tells_the_phase_that_failed_not_the_one_that_went_well(words: str, phase: str | None):
    failure = explain(f"# out of memory\n{words}\n{FULL}").facts
    assert failure is not None
    assert failure.phase == phase


@pytest.mark.parametrize(
    ("words", "never"),
    [
        ("I set the batch_size to 10 and 128, and both result in the error.", "split_general"),
        ("batch size从32改到4，还是一样报错", "split_general"),
        ("バッチサイズを8、4、2と変えても同じエラーになります", "split_general"),
        ("어떤 배치 사이즈로 해도 같은 오류가 납니다", "split_general"),
        ("图像的微调：无论怎么调低分辨率都会报错", "smaller_picture"),
        ("Images are resized. block_size=1, still the same error", "shorter_length"),
        ("- changing batch size to [auto, 1, 2, 4]\nNone of the above attempts work.", "split_general"),
        ("With batch size 64 and 128 it fails, with 32 it works.", None),
        ("tried bs=16, bs=8, bs=4 all OOM", "split_general"),
        ("The paper uses batch sizes 16, 32 and 64, and I always get the error with the third.", None),
        ("Batch size 2, 24GB card, still OOM.", None),
        ("any batch size above 4 fails", None),
    ],
)
def test_a_quantity_of_which_no_value_helped_is_no_fix(words: str, never: str | None):
    found = explain(f"# Training fails\n{words}\n{FULL}")
    codes = {each.code for each in found.remedies}
    assert ("fixed_part" in [each.code for each in found.causes]) == (never is not None)
    assert never not in codes
    if never == "split_general":
        assert not codes & {"smaller_batch", "less_at_once", "split_logged", "split_in_parts"}
    if never is not None:
        assert "smaller_model" in codes
        assert "解決しません" in str(explain(f"# Training fails\n{words}\n{FULL}", lang="ja"))


def test_the_failing_tensor_comes_before_what_else_fills_the_card():
    log = (
        "I train with batch_size 10 and 128, both fail.\nTraceback (most recent call last):\n"
        '  File "/x/torch/nn/_functions/thnn/sparse.py", line 80, in backward\n'
        "    grad_weight = grad_output.new(ctx._weight_size).zero_()\nRuntimeError: cuda runtime error (2) : out of memory"
        " at /pytorch/torch/lib/THC/generic/THCStorage.cu:66"
    )
    codes = [each.code for each in explain(log).remedies]
    assert codes[0] != "smaller_model"
    assert "smaller_model" in codes


MPS = "MPS backend out of memory (MPS allocated: 6.04 GB, other allocations: 1.04 GB, max allowed: 6.77 GB). Tried to allocate 459.07 MB on private pool."


@pytest.mark.parametrize(
    ("log", "code", "is_left"),
    [
        (f"Any workaround exept PYTORCH_MPS_HIGH_WATERMARK_RATIO?\n{MPS}", "mps_watermark", False),
        (f"It fails, except on my other Mac.\n{MPS}", "mps_watermark", True),
        (f"Is there a way to train on images without lowering the resolution?\n{FULL}", "smaller_picture", False),
        (f"Is there a way to train on images?\n{FULL}", "smaller_picture", True),
        (f"画像の学習です。解像度を下げずに動かす方法はありますか？\n{FULL}", "smaller_picture", False),
        (f"I train on images of size 512 instead of image size 64, how to fix?\n{FULL}", "smaller_picture", True),
        (f"CUDA out of memory in evaluation, the batch size during evaluation is 1.\n{FULL}", "eval_batch", False),
        (f"CUDA out of memory in evaluation, the batch size during training is 2.\n{FULL}", "eval_batch", True),
        (f"I train on KITTI for depth estimation.\n{FULL}", "coarser_points", False),
        (f"I train on point clouds of KITTI.\n{FULL}", "coarser_points", True),
        (
            "num_workers=1\nRuntimeError: DataLoader worker (pid 2) is killed by signal: Killed.",
            "kind_fewer_workers",
            False,
        ),
        (
            "num_workers=0 is flat, num_workers=8 is killed.\n"
            "RuntimeError: DataLoader worker (pid 2) is killed by signal: Killed.",
            "kind_fewer_workers",
            True,
        ),
    ],
)
def test_a_fix_that_is_excluded_or_without_place_is_left_out(log: str, code: str, is_left: bool):
    assert (code in [each.code for each in explain(log).remedies]) == is_left


@pytest.mark.parametrize(
    ("words", "helps"),
    [
        ("Sometimes I turn off the terminal that was running python before, and I can run it successfully.", True),
        ("杀掉其他进程之后就能跑了", True),
        ("別のプロセスを終了すると動きます。", True),
        ("다른 터미널을 끄면 실행됩니다.", True),
        ("Wenn ich das andere Terminal schließe, läuft es.", True),
        ("I closed all other programs but it still fails.", False),
        ("The process is killed after it runs for an hour.", False),
        ("他のプロセスを終了しても同じエラーです", False),
    ],
)
def test_a_program_that_was_closed_with_success_comes_first(words: str, helps: bool):
    for message, code in ((FULL, "close_others"), ("RuntimeError: CUDA error: out of memory", "kind_other_programs")):
        found = explain(f"{words}\n{message}")
        assert (found.causes[0].code == "others_closed") == helps
        assert not helps or found.remedies[0].code == code


@pytest.mark.parametrize(
    ("words", "is_told"),
    [
        ("When I run eval.py, after it generates 15 pictures, the error shows.", True),
        ("The demo rendered 8 views but then failed.", True),
        ("渲染到第20帧时报错", True),
        ("推論です。15枚生成した後に落ちます", True),
        ("I use 35 pictures and try to generate a picture of 1008 * 756.", False),
        ("生成15张图片的推理", False),
    ],
)
def test_results_before_the_failure_may_be_kept(words: str, is_told: bool):
    found = explain(f"# rendering\n{words}\n{FULL}")
    assert ("kept_between_passes" in [each.code for each in found.causes]) == is_told
    assert not is_told or "outputs_to_host" in [each.code for each in found.remedies]


@pytest.mark.parametrize(
    ("words", "ran"),
    [
        ("Update from 0.1.29 to 0.1.30 (reverting back to 0.1.29 fixed)", True),
        ("It worked in the previous version but since the latest update it's out of memory.", True),
        ("更新之后就爆显存了，旧版本没问题", True),
        ("アップデートしたらメモリ不足になった。前のバージョンでは動いていました", True),
        ("업데이트 후에 OOM이 발생합니다. 이전 버전에서는 잘 됐습니다", True),
        ("I updated to the latest version and still get the error.", False),
        ("I update the batch from 8 to 4 and it works.", False),
        ("I tried to downgrade to 1.13 but the same problem.", False),
    ],
)
def test_an_older_version_that_ran_is_the_first_fix(words: str, ran: bool):
    found = explain(f"{words}\n{FULL}")
    assert (found.remedies[0].code == "older_version") == ran
    assert not ran or "動いていた以前のバージョン" in str(explain(f"{words}\n{FULL}", lang="ja"))


@pytest.mark.parametrize(
    ("words", "is_size"),
    [
        ("When I increase the hidden size to 512 I get OOM, with 256 it works.", True),
        ("The small version trains fine but the large one OOMs.", True),
        ("파라미터 값을 키울 경우 cuda out of memory가 뜹니다. 모델을 학습합니다.", True),
        ("学習です。モデルを大きくするとメモリ不足になります", True),
        ("When I increase the batch size in training I get OOM.", False),
        ("The small images of the training work, the large ones OOM.", False),
    ],
)
def test_a_model_that_fits_in_a_smaller_size_only_is_made_smaller(words: str, is_size: bool):
    codes = [each.code for each in explain(f"# out of memory\n{words}\n{FULL}").remedies]
    assert ("smaller_model" in codes) == is_size


def test_a_memory_error_without_a_data_loader_is_not_about_workers():
    for place, has_limit in (("", False), ("I run it in docker. ", True)):
        codes = [each.code for each in explain(f"{place}x = np.zeros((n, 10))\nMemoryError").remedies]
        assert codes[:2] == ["kind_data_in_parts", "kind_less_on_host"]
        assert ("kind_raise_limit" in codes) == has_limit
        assert "kind_fewer_workers" not in codes


def test_an_export_that_was_killed_reads_no_data():
    codes = [each.code for each in explain("$ python tools/export_onnx.py -r best.pth # torch\nKilled").remedies]
    assert "kind_kernel_log" in codes
    assert not {"kind_data_in_parts", "kind_fewer_workers"} & set(codes)


LOADED = """Traceback (most recent call last):
  File "run.py", line 8, in finalize
    {line}
"""


@pytest.mark.parametrize(
    ("line", "en", "ja"),
    [
        ("self.optimizer.load_state_dict(best)", "While loading a checkpoint,", "チェックポイントの読み込み"),
        ("self.resume(torch.load(path))", "While resuming,", "再開"),
    ],
)
def test_a_checkpoint_may_be_loaded_for_another_end_than_to_resume(line: str, en: str, ja: str):
    for language, said in (("en", en), ("ja", ja)):
        assert said in str(explain(LOADED.format(line=line) + FULL, lang=language))


def test_an_evaluation_gets_no_accumulation_of_the_training():
    log = LOADED.replace("finalize", "evaluate").format(line="y = torch.cat([a, b])")
    codes = [each.code for each in explain(f"python train.py --batch_size 32\n{log}{FULL}").remedies]
    assert "split_in_parts" not in codes
    assert "eval_batch" in codes


def test_a_report_of_saving_without_figures_gets_the_fixes_of_saving():
    found = explain("It fails when the checkpoint is saved.\nRuntimeError: CUDA error: out of memory")
    assert [each.code for each in found.remedies][:2] == ["save_on_host", "kind_other_programs"]


@pytest.mark.parametrize(
    ("words", "en", "ja"),
    [
        ("# an epoch of training fails", "a training run (“epoch”)", "学習の実行についてのものです（「epoch」）"),
        ("# OOM\npython run_glue.py --do_train --x 1", "a training run (“--do_train”)", "「--do_train」"),
        ("# inference fails", "the use of a trained model (“inference”)", "学習済みモデルの利用（推論）"),
        (
            '  File "/x/tools/demo.py", line 3, in run\n    y = net(x)\n',
            "the use of a trained model (“demo.py, run”)",
            "「demo.py, run」",
        ),
        ("# it fails", None, None),
    ],
)
def test_the_purpose_of_a_run_is_told_where_its_phase_is_not(words: str, en: str | None, ja: str | None):
    for language, said in (("en", en), ("ja", ja)):
        text = "".join(str(explain(f"{words}\n{FULL}", lang=language)).split())
        known = "fixesbelow" in text or "thefixesarefor" in text or "以下の対処は" in text
        assert ("".join(said.split()) in text) if said else not known


@pytest.mark.parametrize(
    ("log", "first"),
    [
        (
            "Traceback (most recent call last):\n"
            '  File "/home/u/net/model.py", line 8, in forward\n    h = self.act(self.fc(x))\n'
            "RuntimeError: CUDA error: out of memory",
            ["less_at_once", "half_precision", "kind_other_programs"],
        ),
        (
            "# my training fails in an epoch with batch_size=16\nRuntimeError: CUDA error: out of memory",
            ["kind_other_programs", "split_in_parts", "checkpointing_general"],
        ),
    ],
)
def test_a_pass_that_the_runtime_gives_no_memory_is_made_smaller(log: str, first: list[str]):
    assert [each.code for each in explain(log).remedies][:3] == first


@pytest.mark.parametrize(
    "words",
    [
        "# Memory leak for RAM\nDuring the training the free memory keeps decreasing.",
        "While training I found the host memory costs too much, nearly 90% of 500 GB.",
        "A warning says that the system does not have enough memory to store the complete replay buffer 63GB > 55GB.",
        "训练时主机内存不断增长",
    ],
)
def test_words_for_the_hosts_memory(words: str):
    facts = explain(words).facts
    assert facts is not None
    assert facts.kind == "host_memory_error"


@pytest.mark.parametrize(
    ("words", "cause", "fix"),
    [
        ("The inference accumulates memory: after about 10 images it fails.", "kept_between_passes", "less_at_once"),
        ("Inference fails at frame 135: memory is not released after a frame.", "kept_between_passes", "less_at_once"),
        ("推理几次之后，显存没有释放\n    y = model(x)", "kept_between_passes", "no_gradients"),
        ("In a training, the memory is not released after each batch.", "growing", "kept_graph"),
        ("The inference fails.", None, "less_at_once"),
    ],
)
def test_what_a_program_keeps_from_pass_to_pass(words: str, cause: str | None, fix: str):
    found = explain(f"# it fails\n{words}\n{FULL}")
    kept = {"kept_between_passes", "growing", "ran_first"} & {each.code for each in found.causes}
    assert kept == ({cause} if cause else set())
    assert found.remedies[0].code == fix


@pytest.mark.parametrize(
    ("cached", "is_first"),
    [("700.00 MiB", False), ("1.10 GiB", True), ("4.90 GiB", True)],
    ids=["alike", "more", "most"],
)
def test_fragments_of_about_the_size_of_the_request_are_no_cause(cached: str, is_first: bool):
    log = (
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 300.00 MiB. GPU 0 has a total capacity of 11.00 GiB "
        "of which 100.00 MiB is free. Including non-PyTorch memory, this process has 10.90 GiB memory in use. Of the "
        f"allocated memory 5.50 GiB is allocated by PyTorch, and {cached} is reserved by PyTorch but unallocated."
    )
    assert (explain(log).causes[0].code == "cache_decides") == is_first


def test_a_batch_that_is_no_option_is_not_the_runs():
    assert "batch_size" not in run_facts_in("`--train_batch_size 16` wasn't an option with this file").numbers
    assert run_facts_in("`--train_batch_size 16` is what I use").numbers["batch_size"] == 16


@pytest.mark.parametrize(
    ("title", "kind"),
    [
        (
            "# Out of Memory Error: run_detect.py\nIt takes more than 12GB on a single GPU, around image 135 of 199.",
            "program_words",
        ),
        (
            "# Try to release GPU memory during the inference\nThe memory cost is increasing until it OOM.",
            "program_words",
        ),
        ("# loading model was Killed\n程序在加载模型中被kill了，torch版本 2.1\nKilled", "host_killed"),
        (
            "# RAM usage increasing as training progresses\nMy CPU RAM (not GPU) usage is increasing continuously.",
            "host_memory_error",
        ),
        ("# High RAM usage when training\nBefore the first epoch finished, it ran out.", "host_memory_error"),
    ],
)
def test_kinds_of_failures_that_people_tell(title: str, kind: str):
    facts = explain(title).facts
    assert facts is not None
    assert facts.kind == kind


@pytest.mark.parametrize(
    ("words", "first"),
    [
        ("# High RAM usage\nThe script is killed at the validation step after epoch 0.", "kind_results_reduced"),
        ("# RAM is full\n検証中に落ちます。", "kind_results_reduced"),
        ("# High RAM usage\nIt comes before the first epoch.", "kind_data_in_parts"),
        ("# GPU OOM problem\nMy GPU Memory-Usage increases during the training.", "kind_kept_tensors"),
        (
            "The GPU memory keeps increasing in training. At last, it returns an error: Out of Memory.",
            "kind_kept_tensors",
        ),
    ],
)
def test_the_first_fix_of_what_people_tell_of_memory(words: str, first: str):
    for language in ("en", "ja"):
        found = explain(words, lang=language)
        assert found.remedies[0].code == first
        assert "{" not in str(found)


@pytest.mark.parametrize(
    ("count", "sizes"),
    [("123.59M", (12, 12, 768)), ("353.77M", (24, 16, 1024)), ("1555.97M", (48, 25, 1600)), ("90.00M", None)],
)
def test_the_printed_number_of_parameters_tells_which_gpt2_a_log_of_nanogpt_is_about(count, sizes):
    """nanoGPT's sizes are in its model.py; its log prints only their product."""
    log = f"""Overriding: batch_size = 16
tokens per iteration will be: 491,520
defaulting to vocab_size of GPT-2 to 50304 (50257 rounded up for efficiency)
number of parameters: {count}
"""
    config = printed_config(printed_in(log), evidence_of(Facts(kind="cuda_out_of_memory"), run_facts_in(log)))

    assert (config and (config.n_layer, config.n_head, config.n_embd)) == sizes
    assert config is None or config.gradient_accumulation_steps == 30
