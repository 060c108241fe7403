//! W3C trace context: where a span is in a trace, as `traceparent` tells it. Pure but for the random ids.

use std::fmt;

/// A span of a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context {
    /// Never 0.
    pub trace: u128,
    /// Never 0.
    pub span: u64,
    /// The trace is recorded.
    pub sampled: bool,
}

impl Context {
    /// Reads `00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01`; `None` where it is not one. Of later versions only the
    /// parts of this one are read. Source: W3C Trace Context, 3.2.
    pub fn parse(text: &str) -> Option<Context> {
        let bytes = text.as_bytes();
        let dashes = [2, 35, 52].iter().all(|&at| bytes.get(at) == Some(&b'-'));
        let version = hex(text.get(0..2)?)?;
        let ends_well = match version {
            0 => text.len() == 55,
            0xff => false,
            _ => text.len() == 55 || bytes.get(55) == Some(&b'-'),
        };
        if !dashes || !ends_well {
            return None;
        }
        let trace = hex(text.get(3..35)?).filter(|&trace| trace != 0)?;
        let span = hex(text.get(36..52)?).filter(|&span| span != 0)? as u64;
        Some(Context { trace, span, sampled: hex(text.get(53..55)?)? & 1 == 1 })
    }

    /// A new trace for `percent` of all; `None`: not this one, or the system has no random numbers.
    pub fn root(percent: u32) -> Option<Context> {
        let (trace, span) = (random()?, random()? as u64);
        let chosen = trace % 100 < u128::from(percent);
        (chosen && trace != 0 && span != 0).then_some(Context { trace, span, sampled: true })
    }

    /// A span of the same trace.
    pub fn child(&self) -> Context {
        // Without random numbers its parent's neighbour: ids must differ within the trace.
        let span = random().map_or(self.span.wrapping_add(1), |random| random as u64);
        Context { span: span.max(1), ..*self }
    }
}

impl fmt::Display for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{:032x}-{:016x}-{:02x}", self.trace, self.span, u8::from(self.sampled))
    }
}

fn hex(text: &str) -> Option<u128> {
    let lower = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    text.bytes().all(lower).then(|| u128::from_str_radix(text, 16).ok()).flatten()
}

fn random() -> Option<u128> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).ok()?;
    Some(u128::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn headers_are_read_as_the_standard_says() {
        let context = Context::parse(GOOD).expect("good");
        assert_eq!(
            (context.trace, context.span, context.sampled),
            (0x4bf92f3577b34da6a3ce929d0e0e4736, 0xf067aa0ba902b7, true)
        );
        assert_eq!(context.to_string(), GOOD);
        assert_eq!(Context::parse(&GOOD.replace("-01", "-00")).map(|context| context.sampled), Some(false));
        assert!(Context::parse(&format!("cc{}-more", &GOOD[2..])).is_some(), "a later version");
        let bad = [
            String::new(),
            GOOD[..54].to_string(),
            format!("{GOOD}-more"),
            GOOD.replace("00-4b", "ff-4b"),
            GOOD.to_uppercase(),
            GOOD.replace('-', "_"),
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01".into(),
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01".into(),
            "00-4bf92f3577b34da6a3ce929d0e0e47é-00f067aa0ba902b7-01".into(),
        ];
        for bad in bad {
            assert_eq!(Context::parse(&bad), None, "{bad}");
        }
    }

    #[test]
    fn a_child_stays_in_its_trace() {
        let root = Context::root(100).expect("all are traced");
        let child = root.child();
        assert_eq!((child.trace, child.sampled), (root.trace, true));
        assert_ne!(child.span, root.span);
        assert_eq!(Context::root(0), None);
    }
}
