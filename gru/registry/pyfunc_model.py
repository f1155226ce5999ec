"""The bundle as an MLflow pyfunc: `mlflow.pyfunc.load_model("models:/NAME@champion").predict(["def "])`.

MLflow loads a model by running this file (models from code), so importing it registers the model.
"""

from typing import TYPE_CHECKING, Any

import mlflow
from mlflow.pyfunc import PythonModel, PythonModelContext

if TYPE_CHECKING:
    from gru.registry.bundle import Bundle


class BundleModel(PythonModel):
    """A bundle that returns each prompt with its continuation. Params: max_tokens (64), temperature (0.8)."""

    bundle: "Bundle"

    def load_context(self, context: PythonModelContext) -> None:
        from gru.registry.bundle import load_bundle  # it needs PyTorch, which registering the model does not

        self.bundle = load_bundle(context.artifacts["bundle"])

    def predict(  # type: ignore[override]  # MLflow reads the types here; the context may be omitted
        self, model_input: list[str], params: dict[str, Any] | None = None
    ) -> list[str]:
        from gru.generation.generate import generate

        settings = {"max_tokens": 64, "temperature": 0.8} | (params or {})
        options = {"tokens": settings["max_tokens"], "temperature": settings["temperature"], "seed": 0}
        return [prompt + generate(self.bundle, prompt, **options) for prompt in model_input]


mlflow.models.set_model(BundleModel())
