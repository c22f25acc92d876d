"""`examples/train_vpit.py`, run as a user runs it, on the images and the model in the repository."""

import io
import json
import os
import shutil
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from datasets import Dataset
from helpers import EMOJI_CHECKPOINT, EXAMPLES_FOLDER, import_example, run_example, write_jsonl
from peft import PeftModel
from PIL import Image
from transformers import AutoModel
from trl import ModelConfig, TrlParser

from metamorph_hf import VPiTConfig
from metamorph_hf.vpit.trainer import last_complete_checkpoint


SMOKE = EXAMPLES_FOLDER / "configs" / "cpu_smoke.yaml"


def train(*flags, cwd: Path, environment: dict | None = None) -> None:
    done = run_example("train_vpit.py", *flags, cwd=cwd, environment=environment)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def script():
    return import_example("train_vpit.py")


@pytest.mark.slow
class TestTraining:
    def test_lora_merge_and_resume(self, tmp_path):
        flags = ["--config", SMOKE, "--sample_steps", 4, "--eval_samples", 4, "--use_peft", "--lora_r", 4, "--merge"]
        flags += ["--model_name_or_path", EMOJI_CHECKPOINT, "--visualizer", EMOJI_CHECKPOINT]
        flags += ["--eval_strategy", "steps", "--save_steps", 2, "--save_total_limit", 2, "--sample_force_image"]
        train(*flags, "--max_steps", 4, cwd=tmp_path)
        out = tmp_path / "runs" / "smoke"
        (sample,) = json.loads((out / "samples" / "step-000004.json").read_text())
        assert sample["answer"].startswith("<image>")
        assert sample["answer"].count("<image>") == len(sample["images"])
        for folder in (out, out / "merged"):
            card = (folder / "README.md").read_text()
            assert all(f"| {fact} |\n" in card for fact in ("steps | 4", "adapter | LORA", "base model | model"))
        logs = json.loads((out / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
        assert any("eval_visual_loss" in log or "eval_text_loss" in log for log in logs)
        adapted = PeftModel.from_pretrained(
            AutoModel.from_pretrained(EMOJI_CHECKPOINT / "model", dtype="float32"), out
        )
        merged = AutoModel.from_pretrained(out / "merged")
        ids = torch.arange(7, 27).unsqueeze(0)
        with torch.no_grad():
            expected, found = adapted.eval()(input_ids=ids).logits, merged.eval()(input_ids=ids).logits
        # The merged model is saved in the base's float16.
        torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)

        refused = run_example("train_vpit.py", *flags, "--max_steps", 6, cwd=tmp_path)
        assert refused.returncode == 1 and "already holds a run" in refused.stderr
        train(*flags, "--max_steps", 6, "--resume", cwd=tmp_path)
        resumed = json.loads((out / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
        assert [log["loss"] for log in resumed if "loss" in log][:4] == [log["loss"] for log in logs if "loss" in log]

    @pytest.mark.parametrize("precompute", [False, True])
    def test_webdataset(self, tmp_path, precompute):
        """Images and captions of a tar, one image broken; as a stream, and with precomputed visual tokens."""
        with tarfile.open(tmp_path / "shard.tar", "w") as tar:
            for number in range(8):
                data = b"broken" if number == 5 else (EMOJI_CHECKPOINT.parent / "red_apple.png").read_bytes()
                for ending, content in (("png", data), ("txt", b"a red apple")):
                    member = tarfile.TarInfo(f"{number:04}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        source = {"task": "text_to_image", "path": "webdataset", "data_files": "shard.tar"}
        config = {
            **yaml.safe_load(SMOKE.read_text()),
            "mixture": [{**source, "streaming": not precompute}],
            "output_dir": "out",
            "on_bad_sample": "skip",
            "max_bad_share": 0.5,
            "max_steps": 4,
            "precompute": precompute,
            "sample_steps": 0,
        }
        (tmp_path / "tar.yaml").write_text(yaml.safe_dump(config))
        flags = ["--config", "tar.yaml", "--model_name_or_path", EMOJI_CHECKPOINT]
        train(*flags, "--per_device_train_batch_size", 2, cwd=tmp_path)
        card = (tmp_path / "out" / "README.md").read_text()
        assert "| steps | 4 |" in card and "| last visual_loss | -" in card
        (rejected,) = (tmp_path / "out").glob("rejected*")
        assert "0005" in rejected.read_text()
        assert not (tmp_path / "out" / "merged").exists()

    def test_revision(self, tmp_path, tiny_model, tiny_processor):
        """Processor, configuration, precomputation and merge all take `--model_revision` of a Hub model, in whose
        main revision images have another number of tokens and weights differ."""
        cache = tmp_path / "cache" / "models--user--model"
        (cache / "refs").mkdir(parents=True)
        for index, (revision, num_image_tokens) in enumerate((("main", 9), ("v2", 4))):
            commit = str(index) * 40
            (cache / "refs" / revision).write_text(commit)
            model = tiny_model(num_image_tokens=num_image_tokens)
            for parameter in model.parameters():
                parameter.data += index
            model.save_pretrained(cache / "snapshots" / commit)
            tiny_processor.save_pretrained(cache / "snapshots" / commit)
            saved = cache / "snapshots" / commit / "processor_config.json"
            saved.write_text(json.dumps({**json.loads(saved.read_text()), "num_image_tokens": num_image_tokens}))
        environment = {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
        Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
        rows = [{"caption": "a red square", "image": str(tmp_path / "red.png")}] * 4
        path = write_jsonl(tmp_path / "data.jsonl", rows)
        config = {**yaml.safe_load(SMOKE.read_text()), "mixture": [{"task": "text_to_image", "path": path}]}
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**config, "sample_steps": 0, "max_steps": 1}))
        flags = ["--config", "mine.yaml", "--model_name_or_path", "user/model", "--model_revision", "v2"]
        flags += ["--precompute", "--use_peft", "--merge", "--output_dir", "out"]
        train(*flags, cwd=tmp_path, environment=environment)
        merged = AutoModel.from_pretrained(tmp_path / "out" / "merged", dtype="float32")
        assert merged.config.num_image_tokens == 4
        tower = model.model.vision_tower.state_dict()
        for name, weight in merged.model.vision_tower.state_dict().items():
            assert torch.equal(weight, tower[name]), name


class TestOutputFolder:
    def find_checkpoint(self, script, output_dir, *flags, model="user/model") -> str | None:
        flags = [*flags, "--output_dir", str(output_dir), "--use_cpu", "--bf16", "false"]
        arguments, training_arguments = TrlParser((script.ScriptArguments, VPiTConfig)).parse_args_and_config(flags)
        return script.find_checkpoint(arguments, training_arguments, model)

    @pytest.fixture
    def run(self, tmp_path, tiny_processor, tiny_model) -> Path:
        """The output folder of a finished run."""
        from helpers import arguments
        from helpers import train as train_tiny

        args = arguments(tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=1)
        train_tiny(tiny_model(), tiny_processor, args).save_model()
        (tmp_path / "run" / "rejected_samples-0.jsonl").write_text("{}\n")
        return tmp_path / "run"

    def test_new_folder(self, script, tmp_path):
        assert self.find_checkpoint(script, tmp_path / "new") is None
        assert self.find_checkpoint(script, tmp_path / "new", "--resume") is None

    def test_folder_with_a_run_is_refused(self, script, run):
        with pytest.raises(SystemExit, match="already holds a run: pass --resume, --overwrite_output_dir"):
            self.find_checkpoint(script, run)
        assert last_complete_checkpoint(run) == str(run / "checkpoint-2")

    def test_resume(self, script, run):
        assert self.find_checkpoint(script, run, "--resume") == str(run / "checkpoint-2")
        explicit = str(run / "checkpoint-1")
        assert self.find_checkpoint(script, run, "--resume_from_checkpoint", explicit) == explicit

    def test_overwrite(self, script, run):
        assert self.find_checkpoint(script, run, "--overwrite_output_dir") is None
        assert not list(run.glob("checkpoint-*")) and not list(run.glob("rejected_samples-*"))

    def test_overwriting_leaves_nothing_that_loads(self, script, run):
        """An adapter beside a new model would be loaded with it."""
        (run / "merged").mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors", "model-00001-of-00002.safetensors"):
            (run / name).touch()
        self.find_checkpoint(script, run, "--overwrite_output_dir")
        assert not [path.name for path in run.iterdir() if "adapter" in path.name or "safetensors" in path.name]
        assert not (run / "merged").exists()

    @pytest.mark.parametrize("name", ["merged/model.safetensors", "adapter_config.json"])
    def test_parts_of_a_run_need_the_flag(self, script, tmp_path, name):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        for model in ("user/model", str(tmp_path / "merged")):
            with pytest.raises(SystemExit, match="already holds a run"):
                self.find_checkpoint(script, tmp_path, model=model)
        assert (tmp_path / name).exists()

    def test_other_files_and_models_are_left_alone(self, script, run, monkeypatch):
        monkeypatch.chdir(run)
        (run / "fresh").mkdir()
        others = [run / "fresh" / "model.safetensors", run / "model.safetensors.bak", run / "other.safetensors"]
        for path in others:
            path.touch()
        for model in ("user/model", "fresh", str(run / "fresh")):
            assert self.find_checkpoint(script, ".", "--overwrite_output_dir", model=model) is None
        assert all(path.exists() for path in others)

    @pytest.mark.parametrize("name", [".", "checkpoint-1"])
    def test_model_in_the_run_that_is_discarded(self, script, run, name):
        with pytest.raises(SystemExit, match="is part of the run that would be discarded"):
            self.find_checkpoint(script, run, "--overwrite_output_dir", model=str(run / name))
        assert last_complete_checkpoint(run) == str(run / "checkpoint-2") and (run / "model.safetensors").exists()

    def test_copies_and_files_are_left_alone(self, script, run):
        (run / "checkpoint-9").write_text("mine")
        (run / "checkpoint-2").rename(run / "checkpoint-2.bak")
        assert self.find_checkpoint(script, run, "--resume") == str(run / "checkpoint-1")
        assert self.find_checkpoint(script, run, "--overwrite_output_dir") is None
        assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-9", "checkpoint-2.bak"}

    def test_model_without_checkpoints(self, script, run):
        for step in (1, 2):
            shutil.rmtree(run / f"checkpoint-{step}")
        with pytest.raises(SystemExit, match="holds a model, but no complete checkpoint"):
            self.find_checkpoint(script, run, "--resume")

    def test_both_flags(self, script, run):
        with pytest.raises(SystemExit, match="pass one of the two"):
            self.find_checkpoint(script, run, "--resume", "--overwrite_output_dir")


class TestArguments:
    FLAGS = ["--model_name_or_path", "model", "--use_cpu", "--bf16", "false", "--output_dir", "out"]
    MIXTURE = [{"task": "llava", "path": "rows.jsonl"}]

    @pytest.mark.parametrize("separator", [[], ["--config"]])
    def test_later_files_and_flags_win(self, script, tmp_path, separator):
        (tmp_path / "a.yaml").write_text(yaml.safe_dump({"max_steps": 1, "save_steps": 1, "seed": 1}))
        (tmp_path / "b.yaml").write_text(yaml.safe_dump({"save_steps": 2, "seed": 2}))
        flags = ["--config", str(tmp_path / "a.yaml"), *separator, str(tmp_path / "b.yaml"), "--seed", "3"]
        _, args, _ = script.parse_arguments([*flags, *self.FLAGS])
        assert (args.max_steps, args.save_steps, args.seed) == (1, 2, 3)

    def test_environment_and_unknown_keys(self, script, tmp_path, monkeypatch, capsys):
        """TRL's `env` sets variables; what nobody knows is refused by name."""
        monkeypatch.setenv("METAMORPH_TEST", "before")
        (tmp_path / "a.yaml").write_text(yaml.safe_dump({"env": {"METAMORPH_TEST": 7}, "seed": 1}))
        assert script.parse_arguments(["--config", str(tmp_path / "a.yaml"), *self.FLAGS])[1].seed == 1
        assert os.environ["METAMORPH_TEST"] == "7"
        (tmp_path / "a.yaml").write_text("sead: 1\n")
        with pytest.raises(SystemExit):
            script.parse_arguments(["--config", str(tmp_path / "a.yaml"), *self.FLAGS])
        assert "unknown keys of the files: --sead 1" in capsys.readouterr().err

    @pytest.mark.parametrize("content", [MIXTURE, {"mixture": MIXTURE, "mixture_size": 5}])
    def test_mixture_file(self, script, tmp_path, content):
        (tmp_path / "mixture.yaml").write_text(yaml.safe_dump(content))
        args, *_ = script.parse_arguments(["--mixture", str(tmp_path / "mixture.yaml"), *self.FLAGS])
        assert args.mixture == self.MIXTURE
        assert args.mixture_size == (None if isinstance(content, list) else 5)

    @pytest.mark.parametrize(
        ("given", "reason"),
        [
            ({"mixture": MIXTURE, "dataset": "rows.json"}, "sources have these options .* leave out --dataset,"),
            ({"mixture": MIXTURE, "image_root": "images", "streaming": True}, "leave out --streaming, --image_root"),
            ({"mixture_size": 5}, "there is no mixture"),
            ({"image_root": "images"}, "--image_root need a --dataset"),
        ],
    )
    def test_data_options_without_effect(self, script, tmp_path, given, reason):
        args = VPiTConfig(str(tmp_path), use_cpu=True, bf16=False)
        with pytest.raises(SystemExit, match=reason):
            script.load_data(script.ScriptArguments(**given), args)


def test_streams_that_repeat_rows_hold_none_out(script, tmp_path):
    Dataset.from_list([{"messages": [{"role": "user", "content": "hello"}] * 2}]).to_parquet(tmp_path / "a.parquet")
    source = {"task": "chat", "path": "parquet", "data_files": str(tmp_path / "a.parquet"), "streaming": True}
    arguments = script.ScriptArguments(mixture=[{**source, "num_samples": 9}], eval_samples=2)
    with pytest.raises(SystemExit, match="may repeat rows that --eval_samples holds out"):
        script.load_data(arguments, VPiTConfig(str(tmp_path), use_cpu=True, bf16=False))


def test_shards_of_processes_hold_none_out(script, tmp_path, monkeypatch):
    """Each process would skip a part of its own shards, which are not the rows that are evaluated."""
    files = [str(tmp_path / f"{number}.parquet") for number in range(2)]
    for file in files:
        Dataset.from_list([{"messages": [{"role": "user", "content": "hello"}] * 2}] * 4).to_parquet(file)
    source = {"task": "chat", "path": "parquet", "data_files": files, "streaming": True}
    arguments = script.ScriptArguments(mixture=[source], eval_samples=2)
    args = VPiTConfig(str(tmp_path), use_cpu=True, bf16=False)
    for count, is_refused in ((1, False), (2, True), (3, False)):
        state = SimpleNamespace(num_processes=count, print=print)
        monkeypatch.setattr(script, "PartialState", lambda state=state: state)
        if is_refused:
            with pytest.raises(SystemExit, match="--eval_samples holds out the first rows of a stream"):
                script.load_data(arguments, args)
        else:
            script.load_data(arguments, args)


def test_more_rows_held_out_than_there_are(script, tmp_path):
    rows = [{"messages": [{"role": "user", "content": str(number)}] * 2} for number in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = script.ScriptArguments(
        mixture=[{"task": "chat", "path": str(tmp_path / "rows.jsonl")}], eval_samples=3
    )
    with pytest.raises(SystemExit, match="holds out 3 samples, but there are only 3"):
        script.load_data(arguments, VPiTConfig(str(tmp_path), use_cpu=True, bf16=False))


@pytest.mark.parametrize("eval_samples", [1, 12])
def test_held_out_rows_are_not_trained_on(script, tmp_path, eval_samples):
    """A mixture may have a row several times."""
    for name, count in (("chats", 20), ("captions", 10)):
        rows = [{"messages": [{"role": "user", "content": f"{name} {number}"}] * 2} for number in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mixture = [{"task": "chat", "path": str(tmp_path / "chats.jsonl")}]
    mixture += [{"task": "chat", "path": str(tmp_path / "captions.jsonl"), "num_samples": 40}]
    arguments = script.ScriptArguments(mixture=mixture, eval_samples=eval_samples)
    trained, held_out = script.load_data(arguments, VPiTConfig(str(tmp_path), use_cpu=True, bf16=False))
    names = [{(row["source"], row["id"]) for row in rows} for rows in (trained, held_out)]
    assert len(held_out) == eval_samples and names[1] and not names[0] & names[1]
    repeated = sum((row["source"], row["id"]) in names[1] for row in script.load_mixture(mixture))
    assert len(trained) == 60 - repeated


@pytest.mark.parametrize("config", sorted((EXAMPLES_FOLDER / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_are_read(script, tmp_path, config):
    flags = ["--config", str(config), "--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false"]
    parsed = TrlParser((script.ScriptArguments, VPiTConfig, ModelConfig)).parse_args_and_config(flags)
    values = {name: value for part in parsed for name, value in vars(part).items()}
    written = yaml.safe_load(config.read_text())
    for name, value in written.items():
        if name not in ("output_dir", "bf16", "mixture", "report_to"):
            assert values[name] == pytest.approx(value), name
    assert (values["mixture"] is None) == ("mixture" not in written)


def test_without_a_model(script, tmp_path, monkeypatch, capsys):
    flags = ["train_vpit.py", "--output_dir", str(tmp_path / "out"), "--use_cpu", "--bf16", "false"]
    monkeypatch.setattr(sys, "argv", flags)
    with pytest.raises(SystemExit, match="2"):
        script.main()
    assert "name a model to start from" in capsys.readouterr().err
