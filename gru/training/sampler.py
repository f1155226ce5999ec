"""Samples during training: what the averaged weights generate at a step, so that people see the model learn.

Plain PyTorch, token ids in and out. A sample is a function of the weights and the prompt: it draws no random number of
torch's, and changes nothing that training reads. T time steps, B lanes, E embedding width, V vocabulary.
"""

from collections.abc import Sequence

import torch

from gru.generation.engine import to_numpy
from gru.generation.sampling import Draw, SamplingParams, sample
from gru.model.inference import inference_model
from gru.model.language_model import GRULanguageModel

TOKENS = 100
PARAMS = SamplingParams(seed=0, temperature=0.5)  # the same noise at each step: only the weights differ


@torch.no_grad()  # not inference mode, in which buffers that training takes again could not be differentiated
def sample_ids(model: GRULanguageModel, prompt: Sequence[int], end_of_text: int, lanes: int = 1) -> list[int]:
    """Return at most TOKENS token ids that continue a document beginning with the prompt, up to its end.

    lanes: all compute the same text. A GPU has compiled its kernels for the number of lanes of the held-out loss.
    """
    inference = inference_model(model, products="bf16")  # whether int8 would do is not worth measuring for one text
    state = inference.initial_state(lanes)
    unread, ids = [end_of_text, *prompt], list[int]()
    while len(ids) < TOKENS:
        tokens_TB = torch.tensor(unread, device=state.device).unsqueeze(1).repeat(1, lanes)
        x_TBE, state = inference.features(tokens_TB, state)
        logits_1V = to_numpy(inference.logits(x_TBE[-1, :1]))
        [token] = unread = sample(logits_1V, [Draw(PARAMS, position=len(ids))]).tolist()
        if token == end_of_text:
            break
        ids.append(token)
    return ids
