//! What several test programs of this crate share.

pub(crate) mod outbox_model;
