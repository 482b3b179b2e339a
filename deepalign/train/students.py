"""The student: a model whose weights are all trained, or one with a LoRA adapter."""

from functools import partial

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from transformers import PreTrainedModel, TrainingArguments, set_seed

from deepalign.models import load_model
from deepalign.train.adapter_targets import default_targets, linear_layers
from deepalign.train.config import LoraConfig, TrainConfig
from deepalign.train.launch import join_deepspeed


def load_student(config: TrainConfig, args: TrainingArguments, world_size: int) -> PreTrainedModel:
    """The student, after `TrainingArguments` have set up the ranks and, under ZeRO-3, the partitioning.

    Raises:
        RuntimeError: transformers does not see the ranks that were started.
        ValueError: an adapter that does not fit the model.
    """
    if args.world_size != world_size:
        raise RuntimeError(
            f"the launcher started {world_size} ranks but transformers sees {args.world_size}: every rank would train "
            "on all the data. Check that accelerate and deepspeed are the versions in constraints.txt"
        )
    if config.deepspeed is not None:
        # ZeRO-3 partitions the student while it is loaded, and asks DeepSpeed's own group for the number of ranks
        join_deepspeed(args.ddp_backend)
    # With DeepSpeed the optimizer holds the fp32 copy of bf16 weights; without, trained weights themselves are fp32.
    # Weights under an adapter are not trained.
    half = args.bf16 and (config.deepspeed or config.lora)
    student = load_model(config.student or config.aligned, torch.bfloat16 if half else torch.float32)
    if config.is_checkpointing(on_gpu=args.device.type != "cpu"):
        student.gradient_checkpointing_enable({"use_reentrant": False})
    return student if config.lora is None else with_adapter(student, config.lora, config.seed)


def with_adapter(student: PreTrainedModel, lora: LoraConfig, seed: int) -> PreTrainedModel:
    """`student` with a fresh LoRA adapter, the only thing that is trained; it changes nothing yet.

    Raises:
        ValueError: no such modules, or an adapter for a head that is tied to the embedding.
    """
    head = _head_name(student)
    if lora.train_lm_head and student.config.get_text_config().tie_word_embeddings:
        raise ValueError(
            "lora.train_lm_head: the head of this model is tied to its embedding, which an adapter on the head alone "
            "would untie when it is merged; set it to false"
        )
    linear = {name.split(".")[-1] for name in linear_layers(student)}
    targets = set(lora.target_modules or default_targets(student))
    if lora.train_lm_head:
        targets.add(head)
    elif head in targets:
        raise ValueError(f"lora.target_modules names the head, {head}; say so by lora.train_lm_head: true")
    if missing := set(lora.target_modules or ()) - linear:
        raise ValueError(
            f"lora.target_modules: the student has no linear layers named {', '.join(sorted(missing))}; it has "
            f"{', '.join(sorted(linear))}"
        )
    set_seed(seed)  # the same start on every rank
    settings = PeftLoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=sorted(targets),
    )
    adapted = get_peft_model(student, settings)
    # peft would put the frozen head beside its adapter, a copy in every checkpoint
    adapted.save_pretrained = partial(adapted.save_pretrained, save_embedding_layers=False)  # type: ignore[method-assign]
    return adapted  # type: ignore[return-value]


def _head_name(model: PreTrainedModel) -> str:
    head = model.get_output_embeddings()
    return next(name for name, module in model.named_modules() if module is head).split(".")[-1]
