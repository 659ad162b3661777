"""Checks made once, when training starts: does the model see the video, is every token counted?"""

import logging

import torch
from accelerate.utils import broadcast_object_list

from veripo_trl.errors import VeripoError
from veripo_trl.files.tables import printable
from veripo_trl.model.encoding import EncodedPrompt, PromptEncoder
from veripo_trl.model.inputs import model_inputs

logger = logging.getLogger(__name__)

ROWS_SEARCHED = 64
ROWS_SHOWN = 3


class FramesIgnoredError(VeripoError):
    """The model's log-probabilities do not depend on the order of the frames."""


def prompt_log_probs(model, unwrapped, prompt: EncodedPrompt, *, config, device) -> torch.Tensor:
    """Log-probabilities of a prompt's text after its last vision token, shape (tokens,), without gradient.

    `model` must carry TRL's fused head (`add_fused_lm_head`), as every TRL trainer's model does.
    """
    input_ids = torch.from_numpy(prompt.input_ids)[None].to(device)
    vision = (input_ids == config.video_token_id) | (input_ids == config.image_token_id)
    last = int(vision[0].nonzero().max())
    labels = input_ids.clone()
    labels[:, : last + 1] = -100
    with torch.no_grad():
        output = model(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            labels=labels,
            fused_lm_head=True,
            **model_inputs([prompt], input_ids, completion_width=0, config=config, frozen_model=unwrapped),
        )
    return output.log_probs[0, last:]


def show_resolved_media(encoder: PromptEncoder, dataset) -> None:
    """Print what the first rows' videos and images became: frames × height × width → tokens."""
    for index in range(min(ROWS_SHOWN, len(dataset))):
        prompt = encoder.encode(dataset[index])
        media = "; ".join(prompt.media) or "text only"
        print(f"row {printable(prompt.question_id)}: {media}; prompt of {len(prompt)} tokens", flush=True)


def check_frames_matter(model, unwrapped, encoder: PromptEncoder, dataset, *, accelerator) -> None:
    """Raise unless shuffling the frames of a video changes the model's log-probabilities.

    Takes the first row, among the first 64, whose encoded frames differ after shuffling. Every process runs the same
    forward passes; the main one decides.

    Args:
        model: the wrapped model, with TRL's fused head. unwrapped: the same without wrappers and without PEFT's.

    Raises:
        FramesIgnoredError: with the row's id.
    """
    for index in range(min(ROWS_SEARCHED, len(dataset))):
        row = dataset[index]
        if not row["videos"]:
            continue
        recorded, shuffled = encoder.encode(row), encoder.encode(row, shuffle_seed=0)
        if not torch.equal(recorded.pixel_values_videos, shuffled.pixel_values_videos):
            break
    else:
        logger.warning(
            "None of the first %d rows has a video whose frames differ from each other: whether the model sees the "
            "order of frames was not checked.",
            min(ROWS_SEARCHED, len(dataset)),
        )
        return
    training = model.training
    model.eval()  # dropout would change log-probabilities by itself
    with accelerator.autocast():
        options = {"config": encoder.config, "device": accelerator.device}
        before = prompt_log_probs(model, unwrapped, recorded, **options)
        after = prompt_log_probs(model, unwrapped, shuffled, **options)
    model.train(training)
    decision = broadcast_object_list([bool((before - after).abs().max() > 0)])
    if not decision[0]:
        raise FramesIgnoredError(
            f"Shuffling the frames of row {row['question_id']!r} ({', '.join(row['videos'])}) left every "
            f"log-probability of its prompt unchanged: the model does not see the video. Expected a vision-language "
            f"model whose forward takes `pixel_values_videos`; got {type(model).__name__}."
        )
