//! Reads a form (`multipart/form-data`, RFC 7578) as it comes in: nothing of a part is held but the piece at hand. Used by
//! `files`.

use axum::extract::Request;
use bytes::{Bytes, BytesMut};
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use http::{HeaderMap, header};
use std::time::Duration;
use tokio::time::timeout;

use super::error::ApiError;

/// Longest boundary (RFC 2046).
const BOUNDARY_BYTES_MAX: usize = 70;

/// Longest head of a part.
const HEAD_BYTES_MAX: usize = 8 << 10;

/// A form.
pub struct Form {
    body: BoxStream<'static, Result<Bytes, axum::Error>>,
    /// `\r\n--` and the boundary.
    delimiter: Vec<u8>,
    /// What was read and not given out.
    buffer: BytesMut,
    /// Nothing may come for so long.
    stall: Duration,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Before a delimiter: the preamble, or a part that is read.
    Content,
    /// Behind a delimiter.
    Head,
    /// Behind the last one.
    End,
}

/// What a part is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Of the field.
    pub name: String,
    /// Of the file, where it is one.
    pub filename: Option<String>,
}

impl Form {
    /// The form in the body of a request; 415 where there is none. A client that sends nothing for `stall` is refused.
    pub fn new(request: Request, stall: Duration) -> Result<Form, ApiError> {
        let boundary = boundary(request.headers()).ok_or_else(ApiError::no_form_type)?;
        Ok(Form {
            body: request.into_body().into_data_stream().map_err(axum::Error::new).boxed(),
            delimiter: format!("\r\n--{boundary}").into_bytes(),
            // As if a line had ended: the first delimiter is like all others.
            buffer: BytesMut::from(&b"\r\n"[..]),
            stall,
            state: State::Content,
        })
    }

    /// The next part; what is left of the one before is skipped. `None`: that was the last.
    pub async fn next(&mut self) -> Result<Option<Part>, ApiError> {
        while self.chunk().await?.is_some() {}
        if self.state == State::End {
            return Ok(None);
        }
        while self.buffer.len() < 2 {
            self.fill().await?;
        }
        if self.buffer.starts_with(b"--") {
            self.state = State::End;
            return Ok(None);
        }
        let end = loop {
            if let Some(end) = find(&self.buffer, b"\r\n\r\n") {
                break end;
            }
            if self.buffer.len() > HEAD_BYTES_MAX {
                return Err(ApiError::no_form("the head of a part is too long"));
            }
            self.fill().await?;
        };
        // The line end before an empty part is that of its head and of its delimiter.
        let head = self.buffer.split_to(end + 4);
        self.buffer = [b"\r\n", &self.buffer[..]].concat().as_slice().into();
        let part = part(&head).ok_or_else(|| ApiError::no_form("a part has no name"))?;
        self.state = State::Content;
        // What was put before is no content.
        self.skip_line_end().await?;
        Ok(Some(part))
    }

    /// The next piece of this part; `None`: that was all of it.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, ApiError> {
        loop {
            if self.state != State::Content {
                return Ok(None);
            }
            if let Some(at) = find(&self.buffer, &self.delimiter) {
                let piece = self.buffer.split_to(at).freeze();
                let _ = self.buffer.split_to(self.delimiter.len());
                self.state = State::Head;
                return Ok(Some(piece).filter(|piece| !piece.is_empty()));
            }
            // A delimiter may have begun at the end.
            let sure = (self.buffer.len() + 1).saturating_sub(self.delimiter.len());
            if sure > 0 {
                return Ok(Some(self.buffer.split_to(sure).freeze()));
            }
            self.fill().await?;
        }
    }

    /// A short part as text.
    pub async fn text(&mut self, name: &str, bytes_max: usize) -> Result<String, ApiError> {
        let mut text = Vec::new();
        while let Some(piece) = self.chunk().await? {
            text.extend_from_slice(&piece);
            if text.len() > bytes_max {
                return Err(ApiError::wrong_value(name, format!("at most {bytes_max} bytes"), "more"));
            }
        }
        String::from_utf8(text).map_err(|_| ApiError::wrong_value(name, "UTF-8", "other bytes"))
    }

    /// Takes the line end that stands before a part's content, unless a delimiter begins with it.
    async fn skip_line_end(&mut self) -> Result<(), ApiError> {
        while self.buffer.len() < self.delimiter.len() {
            self.fill().await?;
        }
        if !self.buffer.starts_with(&self.delimiter) {
            let _ = self.buffer.split_to(2);
        }
        Ok(())
    }

    async fn fill(&mut self) -> Result<(), ApiError> {
        match timeout(self.stall, self.body.next()).await {
            Err(_) => Err(ApiError::slow_body(self.stall)),
            Ok(None) => Err(ApiError::no_form("it ends too early")),
            Ok(Some(Err(error))) => Err(ApiError::no_form(format!("the body broke off ({error})"))),
            Ok(Some(Ok(piece))) => {
                self.buffer.extend_from_slice(&piece);
                Ok(())
            }
        }
    }
}

fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    let mut from = 0;
    loop {
        let at = from + bytes.get(from..)?.iter().position(|&byte| byte == wanted[0])?;
        if bytes[at..].starts_with(wanted) {
            return Some(at);
        }
        from = at + 1;
    }
}

/// Of the header `Content-Type`.
fn boundary(headers: &HeaderMap) -> Option<String> {
    let value = headers.get(header::CONTENT_TYPE)?.to_str().ok()?;
    let (kind, parameters) = value.split_once(';')?;
    if !kind.trim().eq_ignore_ascii_case("multipart/form-data") {
        return None;
    }
    let boundary = parameter(parameters, "boundary")?;
    ((1..=BOUNDARY_BYTES_MAX).contains(&boundary.len())).then_some(boundary)
}

fn part(head: &[u8]) -> Option<Part> {
    let head = String::from_utf8_lossy(head);
    let disposition = head.split("\r\n").find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.trim().eq_ignore_ascii_case("content-disposition").then_some(value)
    })?;
    let (kind, parameters) = disposition.split_once(';')?;
    if !kind.trim().eq_ignore_ascii_case("form-data") {
        return None;
    }
    Some(Part { name: parameter(parameters, "name")?, filename: parameter(parameters, "filename") })
}

/// The value of a parameter in `a=b; c="d"`.
fn parameter(mut text: &str, wanted: &str) -> Option<String> {
    loop {
        let (name, rest) = text.split_once('=')?;
        let name = name.trim_matches(|c: char| c.is_whitespace() || c == ';');
        let rest = rest.trim_start();
        let (value, behind) = match rest.strip_prefix('"') {
            Some(quoted) => {
                let mut escaped = false;
                let end = quoted.char_indices().find(|&(_, c)| {
                    let ends = c == '"' && !escaped;
                    escaped = c == '\\' && !escaped;
                    ends
                });
                let (end, _) = end?;
                // As browsers write it (RFC 7578), or with a backslash.
                (quoted[..end].replace("\\\"", "\"").replace("%22", "\""), &quoted[end + 1..])
            }
            None => {
                let end = rest.find(';').unwrap_or(rest.len());
                (rest[..end].trim().to_owned(), &rest[end..])
            }
        };
        if name.eq_ignore_ascii_case(wanted) {
            return Some(value);
        }
        text = behind;
    }
}

#[cfg(test)]
mod tests {
    use futures::stream;

    use super::*;

    async fn read(body: &[u8], cut: usize) -> Result<Vec<(Part, Vec<u8>)>, ApiError> {
        let pieces: Vec<_> = body.chunks(cut).map(|piece| Ok::<_, ApiErrorText>(piece.to_vec())).collect();
        let request = http::Request::post("/")
            .header("content-type", "multipart/form-data; charset=x; boundary=\"--b\"")
            .body(axum::body::Body::from_stream(stream::iter(pieces)))
            .expect("a request");
        let mut form = Form::new(request, Duration::from_secs(9))?;
        let mut parts = Vec::new();
        while let Some(part) = form.next().await? {
            let mut content = Vec::new();
            while let Some(piece) = form.chunk().await? {
                content.extend_from_slice(&piece);
            }
            parts.push((part, content));
        }
        Ok(parts)
    }

    type ApiErrorText = std::convert::Infallible;

    /// Wherever the network cuts it, and whatever it holds that looks like a delimiter.
    #[tokio::test]
    async fn parts_from_any_cut() {
        let content = b"\r\n----\r\n----x\r\n--\r\n----c\r\n\r\n";
        let body = [
            b"preamble\r\n----b\r\nContent-Disposition: form-data; name=\"purpose\"\r\n\r\nbatch".as_slice(),
            b"\r\n----b\r\ncontent-type: x/y\r\ncontent-disposition: form-data; filename=\"a \\\"b\\\"; c.jsonl\"; name=file\r\n\r\n",
            content,
            b"\r\n----b\r\nContent-Disposition: form-data; name=\"empty\"\r\n\r\n\r\n----b--\r\nepilogue",
        ]
        .concat();
        let part = |name: &str, filename: Option<&str>| Part {
            name: name.into(),
            filename: filename.map(Into::into),
        };
        let expected = vec![
            (part("purpose", None), b"batch".to_vec()),
            (part("file", Some("a \"b\"; c.jsonl")), content.to_vec()),
            (part("empty", None), vec![]),
        ];
        for cut in 1..body.len() {
            assert_eq!(read(&body, cut).await.expect("a form"), expected, "cut every {cut} bytes");
        }
        // Its end is missing, wherever.
        for end in 0..body.len() - 12 {
            assert!(read(&body[..end], 50).await.is_err(), "ends at {end}");
        }
    }

    #[tokio::test]
    async fn what_is_no_form_is_refused() {
        let nameless = b"----b\r\ncontent-disposition: form-data\r\n\r\nx\r\n----b--";
        assert!(read(nameless, 9).await.is_err());
        let long = [b"----b\r\n".as_slice(), &[b'x'; 2 * HEAD_BYTES_MAX]].concat();
        assert!(read(&long, 1000).await.is_err());
        let headers =
            |value: &str| HeaderMap::from_iter([(header::CONTENT_TYPE, value.parse().expect("a header"))]);
        for wrong in [
            "application/json",
            "multipart/form-data",
            "multipart/form-data; boundary=",
            "multipart/mixed; boundary=b",
        ] {
            assert_eq!(boundary(&headers(wrong)), None, "{wrong}");
        }
        assert_eq!(boundary(&headers("Multipart/Form-Data;boundary=b;x=y")), Some("b".into()));
    }
}
