//! Salvage: intact batches behind damage.
