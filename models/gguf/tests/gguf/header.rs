//! The header: what is right is read, and every lie is named.

use gguf::{Fault, Header, List, Value};

use crate::writer::{LIST, Line, TEXT, U32, Writer, text};

fn parse(writer: &Writer) -> Result<Header, String> {
    let bytes = writer.bytes();
    of(&bytes, bytes.len() as u64)
}

fn of(bytes: &[u8], len: u64) -> Result<Header, String> {
    Header::parse("f", bytes, len).map_err(|fault| match fault {
        Fault::More { end } => format!("more: {end}"),
        Fault::Wrong { field, reason } => format!("{field}: {reason}"),
    })
}

fn error(writer: &Writer) -> String {
    parse(writer).expect_err("a lie")
}

/// Two tensors; the second is of blocks.
fn two() -> Writer {
    Writer::new("llama").ones("a.weight", &[2, 3]).tensor("b.weight", &[2, 32], 8, vec![7; 68])
}

#[test]
fn values_of_all_types_and_tensors_are_read() {
    let list =
        |kind: u32, count: u64, items: &[u8]| [&kind.to_le_bytes()[..], &count.to_le_bytes(), items].concat();
    let writer = two()
        .count("count", 7)
        .number("number", 1e-6)
        .flag("flag", true)
        .text("text", "tëxt")
        .texts("texts", &["a", "b"])
        .numbers("numbers", &[0.5, -2.0])
        .key("i8", 1, [0xff])
        .key("u64", 10, u64::MAX.to_le_bytes())
        .key("f64", 12, 2.5f64.to_le_bytes())
        .key("lists", LIST, list(LIST, 1, &list(3, 2, &[0xfe, 0xff, 1, 0])))
        .key("none", LIST, list(LIST, 0, &[]));
    let header = parse(&writer).unwrap();
    let want = [
        ("count", Value::Unsigned(7)),
        // The decimal that was meant, not the nearest f32.
        ("number", Value::Float(1e-6)),
        ("flag", Value::Flag(true)),
        ("text", Value::Text("tëxt".into())),
        ("texts", Value::List(List::Text(vec!["a".into(), "b".into()]))),
        ("numbers", Value::List(List::Float(vec![0.5, -2.0]))),
        ("i8", Value::Signed(-1)),
        ("u64", Value::Unsigned(u64::MAX)),
        ("f64", Value::Float(2.5)),
        ("lists", Value::List(List::List(vec![List::Signed(vec![-2, 1])]))),
        ("none", Value::List(List::List(Vec::new()))),
    ];
    for (key, value) in want {
        assert_eq!(header.metadata.get(key), Some(&value), "{key}");
    }
    let [a, b] = &header.tensors[..] else { panic!("{:?}", header.tensors) };
    assert_eq!((a.name.as_str(), &a.shape[..], a.kind.name), ("a.weight", &[2, 3][..], "F32"));
    assert_eq!((b.name.as_str(), &b.shape[..], b.kind.name), ("b.weight", &[2, 32][..], "Q8_0"));
    assert_eq!((a.range.end - a.range.start, b.range.start - a.range.start), (24, 32));
    let bytes = writer.bytes();
    assert_eq!(&bytes[b.range.start as usize..b.range.end as usize], [7; 68]);
    assert_eq!(parse(&Writer { version: 2, ..two() }).unwrap().tensors.len(), 2);
    let wide = Writer { alignment: 4096, ..two() }.count("general.alignment", 4096);
    assert_eq!(parse(&wide).unwrap().tensors[1].range.start % 4096, 0);
}

#[test]
fn a_header_that_is_cut_asks_for_more_or_says_what_is_missing() {
    let bytes = two().texts("t", &["one", "two"]).bytes();
    let header = Header::parse("f", &bytes, bytes.len() as u64).unwrap();
    let end = header.tensors[0].range.start as usize - 32;
    for cut in 0..end {
        // The file has the bytes, the slice has not: more are wanted, and never more than there are.
        match Header::parse("f", &bytes[..cut], bytes.len() as u64) {
            Err(Fault::More { end }) => assert!(end > cut as u64 && end <= bytes.len() as u64, "{cut} {end}"),
            other => panic!("{cut}: {other:?}"),
        }
        // The file ends there.
        assert!(matches!(Header::parse("f", &bytes[..cut], cut as u64), Err(Fault::Wrong { .. })), "{cut}");
    }
    match Header::parse("f", b"GG", 2) {
        Err(Fault::Wrong { reason, .. }) => assert_eq!(reason, "not a GGUF file"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn counts_and_lengths_that_the_file_cannot_hold_are_refused() {
    let claim = |tensors, keys| error(&Writer { claims: (tensors, keys), ..two() });
    assert_eq!(claim(Some(u64::MAX), None), "header: 18446744073709551615 tensors, at most 1048576");
    assert_eq!(claim(None, Some(1 << 17)), "header: 131072 metadata keys, at most 65536");
    assert!(claim(None, Some(60_000)).starts_with("header: 60000 metadata keys, the file has "));
    assert!(claim(Some(1000), None).starts_with("header: 1000 tensors, the file has "));
    let key = |kind: u32, value: &[u8]| error(&two().key("k", kind, value));
    assert_eq!(
        key(TEXT, &u64::MAX.to_le_bytes()),
        "k: a text of 18446744073709551615 bytes, at most 67108864"
    );
    assert!(key(TEXT, &1_000_000u64.to_le_bytes()).starts_with("k: 1000000 bytes at byte "));
    assert_eq!(
        key(TEXT, &[&1u64.to_le_bytes()[..], &[0xff]].concat()),
        "k: a text that is not UTF-8: invalid utf-8 sequence of 1 bytes from index 0"
    );
    let list = |kind: u32, count: u64| [&kind.to_le_bytes()[..], &count.to_le_bytes()].concat();
    assert_eq!(key(LIST, &list(U32, u64::MAX)), "k: a list of 18446744073709551615 items, at most 16777216");
    assert!(key(LIST, &list(U32, 1 << 20)).starts_with("k: 1048576 list items, the file has "));
    assert_eq!(key(LIST, &list(99, 1)), "k: value type 99 is unknown");
    assert_eq!(key(99, &[]), "k: value type 99 is unknown");
    assert_eq!(key(7, &[2]), "k: 2 is neither true nor false");
    let deep: Vec<u8> = (0..1000).flat_map(|_| list(LIST, 1)).collect();
    assert_eq!(key(LIST, &deep), "k: lists are nested too deep");
}

#[test]
fn keys_and_tensors_that_are_there_twice_are_named() {
    assert_eq!(error(&two().count("k", 1).text("k", "x")), "k: is there twice");
    assert_eq!(error(&two().ones("a.weight", &[1])), "tensor a.weight: is there twice");
}

#[test]
fn tensors_that_lie_are_named() {
    let with = |dims: &[u64], kind: u32, offset: Option<u64>| {
        let mut writer = two();
        writer.tensors.push(Line { name: "c".into(), dims: dims.into(), kind, offset, bytes: vec![0; 64] });
        error(&writer)
    };
    assert_eq!(with(&[], 0, None), "tensor c: 0 dimensions, from 1 to 4");
    assert_eq!(with(&[1, 1, 1, 1, 1], 0, None), "tensor c: 5 dimensions, from 1 to 4");
    assert_eq!(with(&[16], 99, None), "tensor c: element type 99 is unknown");
    assert_eq!(with(&[16], 8, None), "tensor c: rows of 16 elements, Q8_0 has blocks of 32");
    assert_eq!(with(&[0], 0, None), "tensor c: shape [0] of F32");
    assert_eq!(with(&[1 << 32, 1 << 32], 0, None), "tensor c: shape [4294967296, 4294967296] of F32");
    assert_eq!(with(&[1 << 62], 0, None), "tensor c: shape [4611686018427387904] of F32");
    assert_eq!(with(&[16], 0, Some(8)), "tensor c: begins at 8, which is no multiple of 32");
    assert_eq!(with(&[16], 0, Some(32)), "tensor b.weight: shares bytes with tensor c");
    assert!(with(&[16], 0, Some(1 << 40)).starts_with("tensor c: truncated: ends at byte 10995116"));
    assert_eq!(
        with(&[16], 0, Some(u64::MAX - 31)).split_once(", the file has").unwrap().0,
        "tensor c: truncated: ends at byte 18446744073709551615"
    );
    let long = Writer::new("x").ones(&"n".repeat(2000), &[1]);
    assert_eq!(error(&long), "tensor 0: a text of 2000 bytes, at most 1024");
    for alignment in [0, 3, 1 << 30] {
        let text = error(&two().count("general.alignment", alignment));
        assert_eq!(text, format!("general.alignment: {alignment} is no power of two up to 1048576"));
    }
}

#[test]
fn other_files_are_told_apart() {
    assert_eq!(of(b"PK\x03\x04....", 8).unwrap_err(), "header: not a GGUF file");
    let version = |version| error(&Writer { version, ..two() });
    assert_eq!(version(1), "header: GGUF version 1 is not supported (known: 2, 3)");
    assert_eq!(version(3u32.swap_bytes()), "header: big-endian files are not supported");
    assert_eq!(of(&text("GG"), 10).unwrap_err(), "header: not a GGUF file");
}
