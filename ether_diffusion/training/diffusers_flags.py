"""Flags of diffusers' training scripts, and the settings that do the same here: for error messages and for the docs.

Those of `train_dreambooth.py`, `train_dreambooth_lora.py`, `train_text_to_image_lora.py`, `train_controlnet.py` and
similar scripts. `output_dir`, `seed` and `revision` have the same names here.
"""

NO_CONDITIONS = "DreamBooth has no conditions"
NO_CLASS_IMAGES = "there are no class images"
PHOTOS = "photos are in a folder, data.instance_dir; none are fetched"
PAIRS = "pairs are in a folder, data.dataset_dir; none are fetched"

FLAGS: dict[str, str | tuple[str, str]] = {
    "pretrained_model_name_or_path": "base_model",
    "instance_data_dir": ("data.instance_dir", "pairs are in data.dataset_dir"),
    "class_data_dir": ("data.prior.class_dir", NO_CLASS_IMAGES),
    "instance_prompt": ("data.instance_prompt", "each pair has its own caption"),
    "class_prompt": ("data.class_prompt", NO_CLASS_IMAGES),
    "with_prior_preservation": ("data.prior", NO_CLASS_IMAGES),
    "prior_loss_weight": ("data.prior.weight", NO_CLASS_IMAGES),
    "num_class_images": ("data.prior.num_images", NO_CLASS_IMAGES),
    "resolution": "data.resolution",
    "center_crop": "data.crop",
    "random_flip": "data.horizontal_flip",
    "train_data_dir": ("data.instance_dir", "data.dataset_dir"),
    "cache_latents": "data.cache",
    "proportion_empty_prompts": "data.caption_dropout",
    "pretrained_vae_model_name_or_path": "vae",
    "train_text_encoder": ("adapter.text_encoder", "a controllable run leaves the text encoder as it is"),
    "rank": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "train_batch_size": "training.batch_size",
    "num_train_epochs": "training.epochs",
    "max_train_steps": "training.steps",
    "checkpointing_steps": "training.checkpoint_every",
    "checkpoints_total_limit": "training.keep_checkpoints",
    "resume_from_checkpoint": "training.resume",
    "gradient_accumulation_steps": "training.gradient_accumulation",
    "gradient_checkpointing": "training.gradient_checkpointing",
    "learning_rate": "training.learning_rate",
    "lr_scheduler": "training.schedule",
    "lr_warmup_steps": "training.warmup_steps",
    "optimizer": "training.optimizer",
    "use_8bit_adam": "training.optimizer",
    "adam_beta1": "training.betas",
    "adam_beta2": "training.betas",
    "adam_weight_decay": "training.weight_decay",
    "adam_epsilon": "training.epsilon",
    "max_grad_norm": "training.max_grad_norm",
    "mixed_precision": "training.mixed_precision",
    "dataloader_num_workers": "training.workers",
    "snr_gamma": "training.min_snr_gamma",
    "noise_offset": "training.noise_offset",
    "offset_noise": "training.noise_offset",
    "use_ema": "training.ema_decay",
    "report_to": "training.tracker",
    "validation_prompt": "validation.prompts",
    "num_validation_images": ("validation.images_per_prompt", "validation.images"),
    "validation_steps": "validation.every",
    "validation_scheduler": "validation.sampling.scheduler",
    "sample_batch_size": ("class images are generated four at a time on CUDA, else one by one", NO_CLASS_IMAGES),
    "prior_generation_precision": ("class images are generated in the precision of training", NO_CLASS_IMAGES),
    "pre_compute_text_embeddings": "a frozen text encoder encodes each prompt once; data.cache=true frees it",
    "tokenizer_name": "the base has its tokenizer",
    "tokenizer_max_length": "prompts have the length that the base's text encoder takes",
    "text_encoder_use_attention_mask": "Stable Diffusion v1 and v2 are trained without it",
    "skip_save_text_encoder": "a text encoder is never saved whole, only the adapter of a trained one",
    "class_labels_conditioning": "Stable Diffusion v1 and v2 take no class labels",
    "prediction_type": "the base's scheduler config states it",
    "image_interpolation_mode": (
        "photos are resized bilinearly",
        "images are resized bicubically, label maps to the nearest pixel",
    ),
    "cache_dir": "the hub's files are kept in HF_HOME",
    "variant": "weights are read in their own precision, and cast",
    "scale_lr": "the rate is used as given, on any number of processes",
    "lr_num_cycles": "cosine_with_restarts takes one cycle",
    "lr_power": "polynomial has power 1",
    "validation_epochs": "validation counts steps: validation.every",
    "validation_images": "Stable Diffusion v1 and v2 are validated from prompts alone",
    "repeats": ("samples repeat the photos without end", "samples repeat the pairs without end"),
    "local_rank": "accelerate launch sets it",
    "logging_dir": "TensorBoard's files are in output_dir/logs",
    "tracker_project_name": "the name is ether_diffusion",
    "push_to_hub": "push_to_hub",
    "hub_token": "the hub's client reads HF_TOKEN, or what `hf auth login` saved",
    "hub_model_id": "push_to_hub",
    "allow_tf32": "fp32 stays fp32; for speed, training.mixed_precision=bf16",
    "set_grads_to_none": "always on",
    "enable_xformers_memory_efficient_attention": "torch's own attention needs as little memory",
    "dataset_name": (PHOTOS, PAIRS),
    "dataset_config_name": (PHOTOS, PAIRS),
    "image_column": (
        "photos are in a folder, which has no columns",
        "folders have no columns, and JSON lines name images under image or target",
    ),
    "caption_column": (
        "with data.captions=true, a photo's prompt is in the text file of the same name",
        "data.captions",
    ),
    "max_train_samples": ("use a folder with fewer photos", "data.limit"),
    "controlnet_model_name_or_path": (NO_CONDITIONS, "adapter.init_from"),
    "conditioning_image_column": (NO_CONDITIONS, "data.condition"),
    "validation_image": (
        NO_CONDITIONS,
        "validation takes its conditions from the data set: validation.split, validation.images",
    ),
}
"""By flag: the setting that does the same, or a sentence on why there is none; two: of DreamBooth, of pairs."""


def hints(task: str = "dreambooth") -> dict[str, str]:
    """For each flag the setting that does the same in this task, or a sentence on why there is none."""
    own = {flag: hint if isinstance(hint, str) else hint[task == "controllable"] for flag, hint in FLAGS.items()}
    return {flag: f"not needed: {hint}" if " " in hint else hint for flag, hint in own.items()}
