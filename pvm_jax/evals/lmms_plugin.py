"""What lmms-eval's entry point `lmms_eval.models` finds. It imports nothing: lmms-eval calls it for every model."""

NAME = "pvm_jax"


def manifest():
    """Registers `pvm_jax.evals.lmms.PVMJax` as the chat model `pvm_jax`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=NAME, chat_class_path="pvm_jax.evals.lmms.PVMJax")
