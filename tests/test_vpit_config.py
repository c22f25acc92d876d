import copy
import dataclasses
import warnings

import pytest
from helpers import arguments, build_trainer
from transformers import TrainingArguments
from trl import SFTConfig, TrlParser

from metamorph_hf import VPiTConfig
from metamorph_hf.vpit.config import UNSUPPORTED_OPTIONS


# What TRL adds to the options of transformers and VPiT obeys.
OBEYED_OPTIONS = {"model_init_kwargs", "trust_remote_code", "max_length", "activation_offloading"}
OBEYED_OPTIONS |= {"packing", "padding_free", "router_aux_loss_coef"}


class TestRefusedOptions:
    @pytest.mark.parametrize(
        ("option", "reason"),
        [
            ({"stage": "both"}, "stage is 'both', expected 'projector' or 'full'"),
            ({"on_nonfinite_loss": "ignore"}, "expected 'raise' or 'skip'"),
            ({"on_bad_sample": "ignore"}, "expected 'raise' or 'skip'"),
            ({"on_too_long": "cut"}, "expected 'refuse' or 'drop_turns'"),
            ({"packing_strategy": "bfd_split"}, "it would cut conversations, and images in them: use 'bfd'"),
            ({"packing": True, "train_sampling_strategy": "group_by_length"}, "use 'random' or 'sequential'"),
            ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 is not supported"),
            ({"loss_type": "dft"}, "loss_type='dft' is not supported"),
            ({"average_tokens_across_devices": False}, "average_tokens_across_devices=False is not supported"),
            ({"stage": "projector", "vision_head_learning_rate": 1e-3}, "stage 'projector' freezes"),
            ({"stage": "projector", "vision_tower_learning_rate": 1e-3}, "stage 'projector' freezes"),
        ],
    )
    def test_refused(self, tmp_path, option, reason):
        with pytest.raises(ValueError, match=reason):
            arguments(tmp_path, **option)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("completion_only_loss", True),
            ("completion_only_loss", False),
            ("assistant_only_loss", True),
            ("pad_to_multiple_of", 64),
            ("eval_packing", True),
            ("shuffle_dataset", True),
            ("chat_template_path", "template.jinja"),
            ("eos_token", "<|end|>"),
            ("pad_token", "<pad>"),
            ("dataset_text_field", "messages"),
            ("dataset_kwargs", {"skip_prepare_dataset": False}),
            ("dataset_num_proc", 2),
            ("truncation_mode", "keep_end"),
            ("remove_unused_columns", True),
            ("use_liger_kernel", True),
        ],
    )
    def test_without_effect(self, tmp_path, name, value):
        with pytest.raises(ValueError, match=f"^{name}=.* is not supported by VPiT: "):
            arguments(tmp_path, **{name: value})

    def test_defaults_are_not_deprecated(self, tmp_path):
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            args = VPiTConfig(tmp_path, bf16=False, use_cpu=True)
            assert args.activation_checkpointing and args.gradient_checkpointing
            assert not dataclasses.replace(args, activation_checkpointing=False).gradient_checkpointing
        assert not VPiTConfig(tmp_path, bf16=False, gradient_checkpointing=False).activation_checkpointing

    def test_options_of_trl_are_known(self):
        transformers_options = {field.name for field in dataclasses.fields(TrainingArguments)}
        trl_options = {field.name for field in dataclasses.fields(SFTConfig)} - transformers_options
        unknown = trl_options - OBEYED_OPTIONS - UNSUPPORTED_OPTIONS.keys()
        assert not unknown, (
            f"TRL has new options, {', '.join(sorted(unknown))}: make each work and list it in OBEYED_OPTIONS, or "
            "refuse it in UNSUPPORTED_OPTIONS of metamorph_hf.vpit.config."
        )


class TestLearningRates:
    @pytest.mark.parametrize(
        ("batch", "given", "expected"),
        [
            (448, {}, 3.74e-5),  # stage 1 in the released README
            (1536, {}, 6.93e-5),  # stage 2 in the released README
            (48, {}, 1.23e-5),  # the released one-node script
            (48, {"learning_rate": 1e-4}, 1e-4),
            (64, {"learning_rate": 1e-4, "base_batch_size": 256}, 5e-5),
        ],
    )
    def test_square_root_rule(self, tiny_processor, tiny_model, tmp_path, batch, given, expected):
        """The resolved rate is in the arguments, in the optimizer and in the logs."""
        given = {"learning_rate": None, **given}
        args = arguments(tmp_path, per_device_train_batch_size=batch // 8, gradient_accumulation_steps=8, **given)
        assert args.learning_rate == pytest.approx(expected, rel=5e-3)
        trainer = build_trainer(tiny_model(), tiny_processor, args)
        optimizer = trainer.create_optimizer()
        assert [group["lr"] for group in optimizer.param_groups] == [args.learning_rate] * 2
        trainer.train()
        assert trainer.state.log_history[0]["learning_rate"] == args.learning_rate

    def test_rates_of_modules_are_scaled_alike(self, tmp_path):
        rates = {"learning_rate": 1e-4, "projector_learning_rate": 2e-4, "vision_tower_learning_rate": 4e-4}
        args = arguments(tmp_path, per_device_train_batch_size=64, base_batch_size=256, **rates)
        assert {name: getattr(args, name) for name in rates} == pytest.approx({n: r / 2 for n, r in rates.items()})
        assert args.vision_head_learning_rate is None

    @pytest.mark.parametrize("given", [{"learning_rate": None}, {"learning_rate": 1e-4, "base_batch_size": 256}])
    @pytest.mark.parametrize(
        "copied",
        [
            dataclasses.replace,
            copy.deepcopy,
            lambda args: VPiTConfig(**args.to_dict()),
            lambda args: args.__post_init__() or args,
        ],
        ids=["replace", "deepcopy", "to_dict", "post_init"],
    )
    def test_resolving_twice_scales_once(self, tmp_path, given, copied):
        args = arguments(tmp_path, per_device_train_batch_size=64, projector_learning_rate=1e-3, **given)
        expected = (args.learning_rate, args.projector_learning_rate)
        again = copied(args)
        assert (again.learning_rate, again.projector_learning_rate) == expected

    def test_another_batch_size_scales_anew(self, tmp_path):
        args = arguments(tmp_path, per_device_train_batch_size=64, learning_rate=1e-4, base_batch_size=256)
        larger = dataclasses.replace(args, per_device_train_batch_size=256)
        assert larger.learning_rate == pytest.approx(1e-4)
        default = dataclasses.replace(larger, learning_rate=None, base_batch_size=None)
        assert default.learning_rate == pytest.approx(6.93e-5 * (256 / 1536) ** 0.5)

    def test_both_rates_are_printed(self, tiny_processor, tiny_model, tmp_path, capsys):
        args = arguments(tmp_path, learning_rate=None, per_device_train_batch_size=8)
        build_trainer(tiny_model(), tiny_processor, args)
        assert "6.93e-05 for a batch of 1536 is 5e-06 for this batch of 8" in capsys.readouterr().out

    def test_command_line(self, tmp_path):
        flags = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false", "--stage", "projector"]
        flags += ["--learning_rate", "1e-4", "--base_batch_size", "32", "--per_device_train_batch_size", "8"]
        (args,) = TrlParser((VPiTConfig,)).parse_args_and_config(flags)
        assert args.stage == "projector" and args.learning_rate == pytest.approx(5e-5)
