"""The folder of an engine's draft model: found, and checked against the model it drafts for."""

from sagellm.runtime.engine.options import EngineOptionError, EngineOptions
from sagellm.runtime.engine.sizing import lease_shape
from sagellm.runtime.models.folder import ModelFolder, resolve_model


def draft_folder(options: EngineOptions, folder: ModelFolder) -> ModelFolder | None:
    """None where no model drafts; reads no weight. Raises EngineOptionError, ModelError,
    UnsupportedModel.

    The numbers of logits may differ, as padding differs between sizes of a family: what counts is
    that both read token ids alike.
    """
    if options.speculation is not None and lease_shape(options, folder.facts).num_state_blocks:
        raise EngineOptionError(
            f"speculation: {folder.name} has layers with a recurrent state, which cannot go back "
            "to before a wrong draft; drop it"
        )
    if options.draft_model is None:
        return None
    draft = resolve_model(options.draft_model)
    if draft.path is None:
        raise EngineOptionError("draft_model: null computes nothing; name a model, or use ngram")
    if draft.tokenizer_hash != folder.tokenizer_hash:
        raise EngineOptionError(
            f"draft_model: {draft.name} and {folder.name} have different vocabularies; give a "
            "smaller model with the same tokenizer, or use speculation: ngram"
        )
    if lease_shape(options, draft.facts).num_state_blocks:
        raise EngineOptionError(
            f"draft_model: {draft.name} has layers with a recurrent state, which cannot go back to "
            "before a wrong draft; name another, or use speculation: ngram"
        )
    return draft
