//! Holds ARCHITECTURE.md to the code: the paths that it names exist, the rooms depend on each other one way only.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Every crate of the workspace and the crates of the workspace that it may use; dev-dependencies are not bound.
/// Read it as absences: the router has no tensor, models no socket, the KV wire no model, a backend only the seam.
const MAY_USE: &[(&str, &[&str])] = &[
    ("backend", &[]),
    ("backend-cpu", &["backend"]),
    ("backend-cuda", &["backend"]),
    ("backend-mlx", &["backend"]),
    ("proto", &[]),
    ("gguf", &[]),
    ("vocab", &["gguf"]),
    ("grammar", &["vocab"]),
    ("kvtransfer", &["backend", "ucx-sys"]),
    ("ucx-sys", &[]),
    ("models", &["backend", "gguf", "vocab"]),
    ("engine", &["backend", "grammar", "kvtransfer", "models"]),
    ("cluster", &["proto"]),
    (
        "node",
        &[
            "backend",
            "backend-cpu",
            "backend-cuda",
            "backend-mlx",
            "cluster",
            "engine",
            "grammar",
            "kvtransfer",
            "models",
            "proto",
            "vocab",
        ],
    ),
    ("prefill-node", &["cluster", "engine", "kvtransfer", "node", "proto"]),
    ("decode-node", &["cluster", "engine", "kvtransfer", "node", "proto"]),
    ("batch", &[]),
    ("router", &["batch", "cluster", "gguf", "grammar", "proto", "vocab"]),
    ("hub", &[]),
    ("fuzz", &["gguf", "models", "vocab"]),
];

/// The packages that put everything together.
const TOPS: [&str; 2] = ["baton", "benches"];

/// Crates that serve, call or run async code.
const SOCKETS: [&str; 8] = ["axum", "hyper", "mio", "reqwest", "socket2", "tokio", "tonic", "tungstenite"];

/// Rooms where none of these may be: their code runs on the owner thread of a device, or waits for a disk.
const BLOCKING: [&str; 9] =
    ["backend", "backend-cpu", "backend-cuda", "backend-mlx", "batch", "gguf", "grammar", "models", "vocab"];

/// Rooms that know no network at all. (Backends do: ranks join their sums.)
const WITHOUT_NETWORK: [&str; 5] = ["batch", "gguf", "grammar", "models", "vocab"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

struct Manifest {
    name: String,
    folder: PathBuf,
    dependencies: BTreeSet<String>,
}

/// All packages of the workspace.
fn manifests() -> Vec<Manifest> {
    let workspace: toml::Table = read(&root().join("Cargo.toml")).parse().expect("a manifest");
    let members = workspace["workspace"]["members"].as_array().expect("a list of members");
    let folders = members.iter().map(|member| member.as_str().expect("a path")).chain(["."]);
    folders.map(|folder| manifest(&root().join(folder))).collect()
}

fn manifest(folder: &Path) -> Manifest {
    let table: toml::Table = read(&folder.join("Cargo.toml")).parse().expect("a manifest");
    let mut dependencies = BTreeSet::new();
    let mut add = |tables: &toml::Table| {
        for kind in ["dependencies", "build-dependencies"] {
            let found = tables.get(kind).and_then(toml::Value::as_table).into_iter().flatten();
            dependencies.extend(found.map(|(name, _)| name.clone()));
        }
    };
    add(&table);
    let targets = table.get("target").and_then(toml::Value::as_table).into_iter().flatten();
    targets.filter_map(|(_, tables)| tables.as_table()).for_each(add);
    let name = table["package"]["name"].as_str().expect("a name").to_owned();
    Manifest { name, folder: folder.to_owned(), dependencies }
}

/// Files below `folder` that end in `.rs`, without build output and without other people's.
fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![folder.to_owned()];
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(&folder).expect("a folder").map(|entry| entry.expect("an entry").path()) {
            let name = entry.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if entry.is_dir() && name != "target" && !name.starts_with('.') {
                open.push(entry);
            } else if name.ends_with(".rs") {
                found.push(entry);
            }
        }
    }
    found
}

/// The map stays true: what is named in backticks as a path, or stands first in a line of a code block, is there.
#[test]
fn every_path_of_the_map_exists() {
    let text = read(&root().join("ARCHITECTURE.md"));
    let mut named = BTreeSet::new();
    let mut in_block = false;
    for line in text.lines() {
        if line.starts_with("```") {
            in_block = !in_block;
        } else if in_block {
            named
                .extend(line.split_whitespace().next().filter(|_| !line.starts_with(' ')).map(str::to_owned));
        } else {
            // Odd pieces between backticks are code.
            named.extend(line.split('`').skip(1).step_by(2).filter(|code| is_path(code)).map(str::to_owned));
        }
    }
    assert!(named.len() > 20, "the map names only {named:?}");
    let missing: Vec<_> = named.iter().filter(|path| !root().join(path).exists()).collect();
    assert!(missing.is_empty(), "ARCHITECTURE.md names what is not there: {missing:?}");

    for Manifest { name, folder, .. } in manifests().iter().filter(|m| m.name != "baton") {
        let path = folder.strip_prefix(root()).expect("below the root");
        let path = format!("{}/", path.display());
        assert!(named.contains(&path), "ARCHITECTURE.md does not name {path}, the crate {name}");
    }
}

fn is_path(code: &str) -> bool {
    let plain = code.chars().all(|c| c.is_ascii_alphanumeric() || "/._-".contains(c));
    let ends = [".rs", ".md", ".toml", ".proto", ".py"].iter().any(|end| code.ends_with(end));
    // A path from the root of a URL is a route.
    plain && !code.starts_with('/') && (code.contains('/') || ends)
}

/// A room that starts to use another one is a decision: it is made here, not by the way.
#[test]
fn rooms_depend_one_way() {
    let manifests = manifests();
    let names: BTreeSet<_> = manifests.iter().map(|m| m.name.as_str()).collect();
    let may_use: BTreeMap<_, _> = MAY_USE.iter().copied().collect();
    for Manifest { name, dependencies, .. } in &manifests {
        if TOPS.contains(&name.as_str()) {
            continue;
        }
        let Some(may_use) = may_use.get(name.as_str()) else { panic!("{name} is not in MAY_USE") };
        for used in dependencies.iter().filter(|d| names.contains(d.as_str())) {
            assert!(may_use.contains(&used.as_str()), "{name} must not depend on {used}");
        }
        assert!(!dependencies.contains("anyhow"), "{name}: errors are small enums outside the executables");
        let sockets = SOCKETS.iter().find(|socket| dependencies.contains(**socket));
        if let (true, Some(socket)) = (BLOCKING.contains(&name.as_str()), sockets) {
            panic!("{name} must not depend on {socket}");
        }
    }
}

/// What the rule above must add up to.
#[test]
fn the_router_never_sees_a_tensor() {
    let may_use: BTreeMap<_, _> = MAY_USE.iter().copied().collect();
    let mut seen = BTreeSet::new();
    let mut open = vec!["router"];
    while let Some(name) = open.pop() {
        if seen.insert(name) {
            open.extend(may_use[name]);
        }
    }
    assert_eq!(seen, BTreeSet::from(["batch", "cluster", "gguf", "grammar", "proto", "router", "vocab"]));
}

/// One device's code stays in that device's crate; the other rooms meet it through the seam.
#[test]
fn no_device_switch_outside_backends() {
    for path in sources(root()) {
        let inside = path.strip_prefix(root()).expect("below the root");
        // This file must spell what it looks for.
        if inside.starts_with("backends") || inside == Path::new("tests/architecture.rs") {
            continue;
        }
        let text = read(&path);
        assert!(!text.contains("feature = \"cuda\""), "{}: cuda belongs into backends/", inside.display());
    }
}

/// Models compute; they neither listen nor call.
#[test]
fn models_open_no_socket() {
    for Manifest { name, folder, .. } in manifests() {
        if !WITHOUT_NETWORK.contains(&name.as_str()) {
            continue;
        }
        for path in sources(&folder.join("src")) {
            assert!(!read(&path).contains("std::net"), "{} uses std::net", path.display());
        }
    }
}

/// A file says first what it is for.
#[test]
fn every_file_opens_with_its_purpose() {
    let silent: Vec<_> = sources(root()).into_iter().filter(|path| !read(path).starts_with("//!")).collect();
    assert!(silent.is_empty(), "these files do not open with `//!`: {silent:?}");
}
