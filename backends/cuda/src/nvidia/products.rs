//! Dense products through cuBLASLt, whose plans are kept by shape.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ffi::c_void;

use backend::{BackendError, DType};
use cudarc::cublaslt::{result as lt, sys as lt_sys};
use cudarc::driver::{result, sys};

use super::failed;
use crate::driver::{Dense, fault};

/// Scratch memory of a product; what NVIDIA advises for Hopper and later.
const WORKSPACE_BYTES: usize = 32 << 20;
/// Shapes whose plans are kept; ragged batches have ever new ones.
const PLANS_MAX: usize = 4096;
/// The alignment that the library assumes unless told otherwise.
const ALIGNMENT_MAX: u64 = 256;

pub(super) struct Products {
    lt: lt_sys::cublasLtHandle_t,
    /// One for all products: they are in one lane.
    workspace: sys::CUdeviceptr,
    /// By shape: what the library proposed; `None`: it has nothing for it.
    plans: RefCell<HashMap<Shape, Option<Plan>>>,
    /// Whether somebody has been told that it has nothing where it should.
    told: Cell<bool>,
}

/// What a dense product's plan depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Shape {
    bf16: bool,
    out_f32: bool,
    m: usize,
    n: usize,
    k: usize,
    out_stride: usize,
    /// Alignments of w, x, out and bias in bytes; 0: no bias.
    aligned: [u32; 4],
}

/// A dense product as the library wants it.
struct Plan {
    desc: lt_sys::cublasLtMatmulDesc_t,
    w: lt_sys::cublasLtMatrixLayout_t,
    x: lt_sys::cublasLtMatrixLayout_t,
    out: lt_sys::cublasLtMatrixLayout_t,
    algorithm: lt_sys::cublasLtMatmulAlgo_t,
}

impl Shape {
    fn of(product: &Dense) -> Self {
        Shape {
            bf16: product.dtype == DType::BF16,
            out_f32: product.out_f32,
            m: product.m,
            n: product.n,
            k: product.k,
            out_stride: product.out_stride,
            aligned: [product.w, product.x, product.out, product.bias].map(alignment),
        }
    }
}

impl Products {
    /// The context is current.
    pub(super) fn open() -> Result<Self, BackendError> {
        let lt = lt::create_handle().map_err(|error| fault("cublasLt", error))?;
        // SAFETY: the caller's promise.
        let workspace = unsafe { result::malloc_sync(WORKSPACE_BYTES) }.map_err(failed("workspace"))?;
        Ok(Products { lt, workspace, plans: RefCell::default(), told: Cell::new(false) })
    }

    /// Gives everything back.
    ///
    /// # Safety
    /// The context is current, and nothing is queued any more.
    pub(super) unsafe fn close(&mut self) {
        self.plans.get_mut().clear();
        // SAFETY: made in `open`. What cannot be given back goes with the process.
        unsafe {
            let _ = lt::destroy_handle(self.lt);
            let _ = result::free_sync(self.workspace);
        }
    }

    /// Whether the library takes this product; odd widths it does not.
    pub(super) fn takes(&self, product: &Dense) -> bool {
        let shape = Shape::of(product);
        let mut plans = self.plans.borrow_mut();
        if plans.len() >= PLANS_MAX && !plans.contains_key(&shape) {
            plans.clear();
        }
        let plan = || self.plan(shape, product.bias).map_err(|error| self.tell(shape, error)).ok();
        plans.entry(shape).or_insert_with(plan).is_some()
    }

    /// Says once that the library does not take what every version for this GPU takes.
    fn tell(&self, shape: Shape, error: lt::CublasError) {
        let Shape { m, n, k, .. } = shape;
        let even = [n, k, shape.out_stride].iter().all(|size| size.is_multiple_of(64));
        if even && !self.told.replace(true) {
            // SAFETY: writes nothing.
            let version = unsafe { lt_sys::cublasLtGetVersion() };
            eprintln!(
                "cuda: cuBLASLt {version} takes no product of {m} x {k} with {k} x {n} ({error}): slower kernels do it"
            );
        }
    }

    /// Queues a product that the library takes in `stream`.
    pub(super) fn queue(&self, stream: sys::CUstream, product: &Dense) -> Result<(), BackendError> {
        // Its plan may have been dropped since it was asked for.
        if !self.takes(product) {
            return Err(fault("dense product", product));
        }
        let plans = self.plans.borrow();
        let Some(Some(plan)) = plans.get(&Shape::of(product)) else {
            return Err(fault("dense product", product));
        };
        if product.bias != 0 {
            bias_at(plan.desc, product.bias).map_err(|error| fault("dense product", error))?;
        }
        let (alpha, beta) = (1f32, 0f32);
        // SAFETY: handles live as long as the GPU; addresses are of live memory of the plan's shapes.
        unsafe {
            lt::matmul(
                self.lt,
                plan.desc,
                std::ptr::from_ref(&alpha).cast(),
                std::ptr::from_ref(&beta).cast(),
                product.w as *const c_void,
                plan.w,
                product.x as *const c_void,
                plan.x,
                product.out as *const c_void,
                plan.out,
                product.out as *mut c_void,
                plan.out,
                &plan.algorithm,
                self.workspace as *mut c_void,
                WORKSPACE_BYTES,
                stream.cast(),
            )
        }
        .map_err(|error| fault("dense product", error))
    }

    /// With a bias like this one, if with any: the library looks at its alignment.
    fn plan(&self, shape: Shape, bias: u64) -> Result<Plan, lt::CublasError> {
        use lt_sys::{
            cublasComputeType_t as Compute, cublasLtMatmulDescAttributes_t as Of, cudaDataType as Type,
        };
        let element = if shape.bf16 { Type::CUDA_R_16BF } else { Type::CUDA_R_32F };
        let result = if shape.out_f32 { Type::CUDA_R_32F } else { element };
        let (m, n, k) = (shape.m as u64, shape.n as u64, shape.k as u64);
        // Row-major out [m, n] is column-major [n, m] = W^T (of [k, n]) times x [k, m].
        let desc = lt::create_matmul_desc(Compute::CUBLAS_COMPUTE_32F, Type::CUDA_R_32F)?;
        // CUBLAS_OP_T
        let transposed = 1i32;
        let w = lt::create_matrix_layout(element, k, n, k as i64)?;
        let x = lt::create_matrix_layout(element, k, m, k as i64)?;
        let out = lt::create_matrix_layout(result, n, m, shape.out_stride as i64)?;
        let preference = lt::create_matmul_pref()?;
        // SAFETY: handles were just made; attributes are given with their sizes.
        let algorithm = unsafe {
            lt::set_matmul_desc_attribute(
                desc,
                Of::CUBLASLT_MATMUL_DESC_TRANSA,
                std::ptr::from_ref(&transposed).cast(),
                size_of_val(&transposed),
            )?;
            if bias != 0 {
                let epilogue = lt_sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS as u32;
                let value = std::ptr::from_ref(&epilogue).cast();
                lt::set_matmul_desc_attribute(desc, Of::CUBLASLT_MATMUL_DESC_EPILOGUE, value, 4)?;
                bias_at(desc, bias)?;
            }
            use lt_sys::cublasLtMatmulPreferenceAttributes_t as Preference;
            lt::set_matmul_pref_attribute(
                preference,
                Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                std::ptr::from_ref(&WORKSPACE_BYTES).cast(),
                size_of_val(&WORKSPACE_BYTES),
            )?;
            // Parts of a sum meet as f32; else they may meet in the result's type.
            let reductions = lt_sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
            lt::set_matmul_pref_attribute(
                preference,
                Preference::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                std::ptr::from_ref(&reductions).cast(),
                size_of_val(&reductions),
            )?;
            let [w_bytes, x_bytes, out_bytes, _] = shape.aligned;
            for (attribute, bytes) in [
                (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, w_bytes),
                (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, x_bytes),
                (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, out_bytes),
                (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, out_bytes),
            ] {
                let value = std::ptr::from_ref(&bytes).cast();
                lt::set_matmul_pref_attribute(preference, attribute, value, size_of_val(&bytes))?;
            }
            let found = lt::get_matmul_algo_heuristic(self.lt, desc, w, x, out, out, preference);
            let _ = lt::destroy_matmul_pref(preference);
            found?.algo
        };
        Ok(Plan { desc, w, x, out, algorithm })
    }
}

/// The bias of the next product by `desc`.
fn bias_at(desc: lt_sys::cublasLtMatmulDesc_t, bias: u64) -> Result<(), lt::CublasError> {
    let of = lt_sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER;
    // SAFETY: a live handle; the attribute is an address, given with its size.
    unsafe { lt::set_matmul_desc_attribute(desc, of, std::ptr::from_ref(&bias).cast(), size_of_val(&bias)) }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: made in `plan`, destroyed once; queued products have copied what they need.
        unsafe {
            let _ = lt::destroy_matmul_desc(self.desc);
            for layout in [self.w, self.x, self.out] {
                let _ = lt::destroy_matrix_layout(layout);
            }
        }
    }
}

/// The largest power of two that divides `address`, as far as the library cares; 0 of none.
fn alignment(address: u64) -> u32 {
    if address == 0 { 0 } else { 1 << (address | ALIGNMENT_MAX).trailing_zeros() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alignments_are_powers_of_two_up_to_what_the_library_assumes() {
        assert_eq!([0, 4096, 16, 2, 6, 1 << 40].map(alignment), [0, 256, 16, 2, 2, 256]);
    }
}
