//! Block accounting for paged stores (CPU, CUDA): tables, reference counts, quarantine. Pure: no memory is touched.
