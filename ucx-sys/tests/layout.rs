//! Compares the declarations with the headers of an installed UCX: offsets of every field that is set, and every number.
//! Needs a C compiler and the headers: `UCX_INCLUDE=/usr/include cargo test -p ucx-sys --test layout`; without, it says so.

use std::collections::BTreeMap;
use std::mem::offset_of;
use std::process::Command;

use ucx_sys::raw::*;

macro_rules! declared {
    ($(fields of $rust:ident as $c:literal: $($field:ident),*;)* numbers: $($number:ident),* $(,)?) => {{
        let mut lines = String::new();
        let mut ours: BTreeMap<String, i64> = BTreeMap::new();
        $($(
            let name = format!("{}.{}", $c, stringify!($field));
            lines += &format!("printf(\"{name} %lld\\n\", (long long)offsetof({}, {}));\n", $c, stringify!($field));
            ours.insert(name, offset_of!($rust, $field) as i64);
        )*
        // Ours has room for what later releases append.
        lines += &format!("if (sizeof({0}) > {1}) printf(\"{0} is longer 1\\n\");\n", $c, size_of::<$rust>());
        )*
        $(
            lines += &format!("printf(\"{0} %lld\\n\", (long long){0});\n", stringify!($number));
            ours.insert(stringify!($number).to_owned(), $number as i64);
        )*
        (lines, ours)
    }};
}

#[test]
fn declarations_are_those_of_the_headers() {
    let Ok(include) = std::env::var("UCX_INCLUDE") else {
        println!("skipped: UCX_INCLUDE names no directory with ucp/api/ucp.h");
        return;
    };
    let (lines, ours) = declared! {
        fields of ucp_params_t as "ucp_params_t": field_mask, features, mt_workers_shared;
        fields of ucp_context_attr_t as "ucp_context_attr_t": field_mask, memory_types;
        fields of ucp_worker_params_t as "ucp_worker_params_t": field_mask, thread_mode;
        fields of ucp_err_handler_t as "ucp_err_handler_t": cb, arg;
        fields of ucp_ep_params_t as "ucp_ep_params_t": field_mask, address, err_mode, err_handler;
        fields of ucp_mem_map_params_t as "ucp_mem_map_params_t": field_mask, address, length, prot, memory_type;
        fields of ucp_request_param_t as "ucp_request_param_t": op_attr_mask, flags, memory_type;
        numbers: UCS_OK, UCS_INPROGRESS, UCS_ERR_BUSY, UCP_PARAM_FIELD_FEATURES, UCP_PARAM_FIELD_MT_WORKERS_SHARED,
        UCP_FEATURE_RMA, UCP_FEATURE_WAKEUP, UCP_WORKER_PARAM_FIELD_THREAD_MODE, UCS_THREAD_MODE_SERIALIZED,
        UCP_EP_PARAM_FIELD_REMOTE_ADDRESS, UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE, UCP_EP_PARAM_FIELD_ERR_HANDLER,
        UCP_ERR_HANDLING_MODE_NONE, UCP_ERR_HANDLING_MODE_PEER, UCP_MEM_MAP_PARAM_FIELD_ADDRESS,
        UCP_MEM_MAP_PARAM_FIELD_LENGTH, UCP_MEM_MAP_PARAM_FIELD_PROT, UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE,
        UCP_MEM_MAP_PROT_LOCAL_READ, UCP_MEM_MAP_PROT_LOCAL_WRITE, UCP_MEM_MAP_PROT_REMOTE_READ, UCS_MEMORY_TYPE_HOST,
        UCS_MEMORY_TYPE_CUDA, UCP_ATTR_FIELD_MEMORY_TYPES,
        UCP_OP_ATTR_FIELD_FLAGS, UCP_OP_ATTR_FIELD_MEMORY_TYPE, UCP_EP_CLOSE_FLAG_FORCE,
    };
    let dir = std::path::Path::new(env!("CARGO_TARGET_TMPDIR"));
    let (source, program) = (dir.join("layout.c"), dir.join("layout"));
    let text = format!(
        "#include <stddef.h>\n#include <stdio.h>\n#include <ucp/api/ucp.h>\nint main(void) {{\n{lines}return 0;\n}}\n"
    );
    std::fs::write(&source, text).expect("a file in the target directory");
    let compiled = Command::new("cc")
        .arg("-w")
        .arg(format!("-I{include}"))
        .arg(&source)
        .arg("-o")
        .arg(&program)
        .status();
    assert!(compiled.expect("a C compiler").success(), "the headers do not compile");
    let output = Command::new(&program).output().expect("the program runs");
    let theirs: BTreeMap<String, i64> = String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| line.rsplit_once(' '))
        .map(|(name, number)| (name.to_owned(), number.parse().expect("a number")))
        .collect();
    assert_eq!(ours, theirs);
}
