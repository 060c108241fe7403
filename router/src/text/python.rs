//! What chat templates use of Python and Jinja2 that the engine has not, or has in another way. Called by `template`.

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State};
use minijinja_contrib::pycompat::unknown_method_callback;

/// Adds it to `environment`.
pub(super) fn add(environment: &mut Environment<'static>) {
    environment.set_unknown_method_callback(method);
    environment.add_filter("e", escape);
    environment.add_filter("escape", escape);
    environment.add_filter("wordcount", |text: &str| text.split_whitespace().count());
    environment.add_test("iterable", iterable);
}

/// None is nothing to iterate over; the engine takes it for an empty list.
fn iterable(value: &Value) -> bool {
    value.kind() != ValueKind::None && value.try_iter().is_ok()
}

/// The entities of Python's `markupsafe`. Text that is marked as safe is escaped as well: templates of prompts escape
/// nothing by themselves.
fn escape(value: &Value) -> Value {
    let mut text = String::new();
    for c in value.to_string().chars() {
        match c {
            '&' => text.push_str("&amp;"),
            '<' => text.push_str("&lt;"),
            '>' => text.push_str("&gt;"),
            '\'' => text.push_str("&#39;"),
            '"' => text.push_str("&#34;"),
            c => text.push(c),
        }
    }
    Value::from(text)
}

/// Methods of `str` beyond those of the engine's own collection.
fn method(state: &mut State<'_, '_>, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    let Some(text) = value.as_str() else { return unknown_method_callback(state, value, name, args) };
    let argument = |index: usize| {
        let wrong =
            || Error::new(ErrorKind::InvalidOperation, format!("{name}: argument {index} is no text"));
        args.get(index).and_then(Value::as_str).ok_or_else(wrong)
    };
    Ok(match name {
        "removeprefix" => text.strip_prefix(argument(0)?).unwrap_or(text).into(),
        "removesuffix" => text.strip_suffix(argument(0)?).unwrap_or(text).into(),
        "partition" => match text.split_once(argument(0)?) {
            Some((before, after)) => tuple(&[before, argument(0)?, after]),
            None => tuple(&[text, "", ""]),
        },
        "rpartition" => match text.rsplit_once(argument(0)?) {
            Some((before, after)) => tuple(&[before, argument(0)?, after]),
            None => tuple(&["", "", text]),
        },
        "index" => match text.find(argument(0)?) {
            Some(at) => text[..at].chars().count().into(),
            None => return Err(Error::new(ErrorKind::InvalidOperation, "substring not found")),
        },
        "zfill" => {
            let width = args.first().and_then(Value::as_usize).unwrap_or_default().min(1 << 10);
            let (sign, digits) = text.split_at(usize::from(text.starts_with(['+', '-'])));
            format!("{sign}{digits:0>width$}", width = width.saturating_sub(sign.len())).into()
        }
        "rsplit" => {
            let (positional, kwargs) = match args.split_last() {
                Some((last, rest)) if last.is_kwargs() => (rest, Kwargs::try_from(last.clone())?),
                _ => (args, Kwargs::from_iter(std::iter::empty::<(String, Value)>())),
            };
            let most = match positional.get(1) {
                Some(most) => Some(i64::try_from(most.clone())?),
                None => kwargs.get::<Option<i64>>("maxsplit")?,
            };
            let pieces =
                usize::try_from(most.unwrap_or(-1)).map_or(usize::MAX, |most| most.saturating_add(1));
            let mut parts: Vec<&str> = match positional.first().and_then(Value::as_str) {
                Some(separator) => text.rsplitn(pieces, separator).collect(),
                None => rsplit_spaces(text, pieces),
            };
            parts.reverse();
            Value::from_iter(parts)
        }
        _ => return unknown_method_callback(state, value, name, args),
    })
}

/// At most `pieces` words from the end, the last of them with all that is left.
fn rsplit_spaces(text: &str, pieces: usize) -> Vec<&str> {
    let (mut parts, mut rest) = (Vec::new(), text.trim_end());
    while !rest.is_empty() {
        if parts.len() + 1 == pieces {
            parts.push(rest);
            break;
        }
        let at = rest
            .rfind(char::is_whitespace)
            .map_or(0, |at| at + rest[at..].chars().next().map_or(1, char::len_utf8));
        parts.push(&rest[at..]);
        rest = rest[..at].trim_end();
    }
    parts
}

fn tuple(parts: &[&str]) -> Value {
    parts.iter().map(|part| Value::from(*part)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Expectations are what CPython 3.11 gives.
    #[test]
    fn methods_of_texts() {
        let mut environment = Environment::new();
        add(&mut environment);
        let of = |source: &str| environment.render_str(source, ()).expect("rendered");
        assert_eq!(
            of("{{ 'a,b,c'.rsplit(',', 1) }}{{ 'a b  c '.rsplit() }}{{ ' a b c'.rsplit(none, 1) }}"),
            "['a,b', 'c']['a', 'b', 'c'][' a b', 'c']"
        );
        assert_eq!(
            of("{{ 'a,b'.rsplit(',', maxsplit=0) }}{{ ''.rsplit() }}{{ ''.rsplit(',') }}"),
            "['a,b'][]['']"
        );
        assert_eq!(
            of(
                "{{ 'k=v=w'.partition('=')[2] }} {{ 'k=v=w'.rpartition('=')[0] }} {{ 'x'.rpartition('=')[2] }}"
            ),
            "v=w k=v x"
        );
        assert_eq!(
            of(
                "{{ 'abc'.removeprefix('a') }}{{ 'abc'.removesuffix('x') }}{{ 'éb'.index('b') }}{{ '-7'.zfill(4) }}"
            ),
            "bcabc1-007"
        );
        assert!(environment.render_str("{{ 'a'.index('b') }}", ()).is_err());
        assert_eq!(
            of("{{ none is iterable }}{{ [] is iterable }}{{ 'a' is iterable }}{{ 1 is iterable }}"),
            "falsetruetruefalse".replace("false", "False").replace("true", "True")
        );
    }
}
