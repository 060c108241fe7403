//! Models of several files, and finding the file of a directory.

use std::fs;
use std::path::Path;

use gguf::{Gguf, find};
use tempfile::TempDir;

use crate::writer::Writer;

fn part(no: u32, count: u32, tensor: &str) -> Writer {
    let writer = Writer::new("llama").count("split.no", no).count("split.count", count);
    writer.count("split.tensors.count", 3).ones(tensor, &[4])
}

fn three() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (no, tensor) in ["a", "b", "c"].into_iter().enumerate() {
        write(&dir, &format!("m-0000{}-of-00003.gguf", no + 1), &part(no as u32, 3, tensor));
    }
    dir
}

fn write(dir: &TempDir, name: &str, writer: &Writer) {
    fs::write(dir.path().join(name), writer.bytes()).unwrap();
}

/// The error of opening `name`, with the directory cut off.
fn error(dir: &TempDir, name: &str) -> String {
    let error = Gguf::open(&dir.path().join(name)).unwrap_err().to_string();
    error.replace(&format!("{}/", dir.path().display()), "")
}

#[test]
fn any_part_opens_the_whole() {
    let dir = three();
    for name in ["m-00001-of-00003.gguf", "m-00003-of-00003.gguf"] {
        let gguf = Gguf::open(&dir.path().join(name)).unwrap();
        let tensors: Vec<_> = gguf.tensors().map(|(name, tensor)| (name, tensor.part)).collect();
        assert_eq!(tensors, [("a", 0), ("b", 1), ("c", 2)]);
        assert!(gguf.paths()[1].ends_with("m-00002-of-00003.gguf"));
        assert!(gguf.path().ends_with("m-00001-of-00003.gguf"));
    }
}

#[test]
fn parts_that_do_not_fit_are_named() {
    let dir = three();
    let (first, second) = ("m-00001-of-00003.gguf", "m-00002-of-00003.gguf");
    write(&dir, second, &part(0, 3, "b"));
    assert_eq!(error(&dir, first), "m-00002-of-00003.gguf: split.no: 0, expected 1");
    write(&dir, second, &Writer::new("llama").ones("b", &[4]));
    assert_eq!(error(&dir, first), "m-00002-of-00003.gguf: split.no: missing, expected 1");
    write(&dir, second, &part(1, 3, "a"));
    assert_eq!(error(&dir, first), "m-00002-of-00003.gguf: tensor a: is in an earlier part as well");
    write(&dir, second, &part(1, 3, "b").ones("d", &[4]));
    assert_eq!(error(&dir, first), "m-00001-of-00003.gguf: split.tensors.count: 3, the 3 parts have 4");
    fs::remove_file(dir.path().join(second)).unwrap();
    assert!(error(&dir, first).starts_with("m-00002-of-00003.gguf: "), "{}", error(&dir, first));
    write(&dir, "other.gguf", &part(0, 3, "a"));
    assert_eq!(
        error(&dir, "other.gguf"),
        "other.gguf: split.no: part 0 of 3 has a name that ends in -00001-of-00003.gguf"
    );
    write(&dir, "many.gguf", &part(0, 5000, "a"));
    assert_eq!(error(&dir, "many.gguf"), "many.gguf: split.count: part 0 of 5000");
    write(&dir, "behind.gguf", &part(3, 3, "a"));
    assert_eq!(error(&dir, "behind.gguf"), "behind.gguf: split.count: part 3 of 3");
}

#[test]
fn a_large_header_is_read_whole_and_a_file_that_is_none_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    // Three times what is read at first.
    let text = "x".repeat(3 << 20);
    write(&dir, "large.gguf", &Writer::new("llama").text("tokenizer.chat_template", &text).ones("a", &[1]));
    let gguf = Gguf::open(&dir.path().join("large.gguf")).unwrap();
    assert_eq!(gguf.metadata().text("tokenizer.chat_template").unwrap().map(str::len), Some(3 << 20));
    assert_eq!(gguf.architecture().unwrap(), "llama");
    fs::write(dir.path().join("page.gguf"), "<html>").unwrap();
    assert_eq!(error(&dir, "page.gguf"), "page.gguf: header: not a GGUF file");
    fs::create_dir(dir.path().join("dir.gguf")).unwrap();
    assert_eq!(error(&dir, "dir.gguf"), "dir.gguf: file: not a regular file");
    assert!(error(&dir, "none.gguf").starts_with("none.gguf: "));
}

#[test]
fn the_file_of_a_directory_is_found() {
    let dir = three();
    fs::write(dir.path().join("mmproj-m.gguf"), "").unwrap();
    fs::write(dir.path().join("README.md"), "").unwrap();
    let found = |path: &Path| find(path).map(|path| path.map(|path| path.file_name().unwrap().to_owned()));
    let first = "m-00001-of-00003.gguf";
    assert_eq!(found(dir.path()).unwrap().unwrap(), first);
    assert_eq!(found(&dir.path().join(first)).unwrap().unwrap(), first);
    assert_eq!(found(&dir.path().join("README.md")).unwrap(), None);
    // A file of another name is known by how it begins; a directory's files are not opened for that.
    write(&dir, "sha256-3f1c", &Writer::new("llama").ones("a", &[1]));
    assert_eq!(found(&dir.path().join("sha256-3f1c")).unwrap().unwrap(), "sha256-3f1c");
    assert_eq!(found(dir.path()).unwrap().unwrap(), first);
    assert_eq!(found(&dir.path().join("sha256-none")).unwrap(), None);
    assert_eq!(found(tempfile::tempdir().unwrap().path()).unwrap(), None);
    fs::write(dir.path().join("n.gguf"), "").unwrap();
    let error = found(dir.path()).unwrap_err().to_string();
    let want = "GGUF files: several: m-00001-of-00003.gguf, n.gguf; give the one to use";
    assert!(error.ends_with(want), "{error}");
}
