//! Reads GBNF, the notation of llama.cpp and of vLLM's `guided_grammar`: `root ::= "a" item*`. Written over as Lark.

use crate::GrammarError;

/// Whether a grammar is in this notation.
pub fn is(text: &str) -> bool {
    text.contains("::=")
}

/// The same grammar in Lark; `root` becomes `start`. The error names the place.
pub fn to_lark(text: &str) -> Result<String, GrammarError> {
    let mut reader = Reader { rest: text.chars().peekable(), out: String::new(), depth: 0 };
    reader.rules()?;
    Ok(reader.out)
}

struct Reader<'a> {
    rest: std::iter::Peekable<std::str::Chars<'a>>,
    out: String,
    /// Open parentheses: line breaks inside are layout.
    depth: usize,
}

impl Reader<'_> {
    fn rules(&mut self) -> Result<(), GrammarError> {
        // A rule begins with a name and `::=`; a name within a rule may turn out to begin the next.
        while let Some(&c) = self.rest.peek() {
            match c {
                '\n' => self.line_break(),
                c if c.is_whitespace() => self.copy(),
                '#' => while self.rest.next_if(|&c| c != '\n').is_some() {},
                '"' => self.string()?,
                '[' => self.class()?,
                '(' => {
                    self.depth += 1;
                    self.copy();
                }
                ')' => {
                    self.depth = self.depth.checked_sub(1).ok_or_else(|| wrong("a parenthesis too many"))?;
                    self.copy();
                }
                '|' | '*' | '+' | '?' => self.copy(),
                '{' => {
                    while self.rest.peek().is_some_and(|&c| c != '}') {
                        self.copy();
                    }
                    if self.rest.peek().is_none() {
                        return Err(wrong("a repetition without its end"));
                    }
                    self.copy();
                }
                '.' => {
                    self.rest.next();
                    self.out.push_str("/(?s:.)/");
                }
                c if is_name(c) => self.name()?,
                c => return Err(wrong(format!("unexpected '{c}'"))),
            }
        }
        if self.depth > 0 {
            return Err(wrong("a parenthesis is not closed"));
        }
        Ok(())
    }

    fn copy(&mut self) {
        self.out.extend(self.rest.next());
    }

    /// Lark ends a rule at the end of its line, unless the next begins with `|`.
    fn line_break(&mut self) {
        self.rest.next();
        let mut ahead = self.rest.clone();
        while ahead.next_if(|c| c.is_whitespace()).is_some() {}
        let mut after = ahead.clone();
        while after.next_if(|&c| is_name(c)).is_some() {}
        while after.next_if(|&c| c == ' ' || c == '\t').is_some() {}
        let begins_rule = after.next() == Some(':') && after.next() == Some(':');
        let comment = ahead.peek() == Some(&'#');
        let goes_on = self.depth > 0 || !(begins_rule || comment || ahead.peek().is_none());
        self.out.push(if goes_on { ' ' } else { '\n' });
    }

    /// A rule's name, with its definition if one follows.
    fn name(&mut self) -> Result<(), GrammarError> {
        let mut name = String::new();
        while let Some(c) = self.rest.next_if(|&c| is_name(c)) {
            name.push(if c == '-' { '_' } else { c.to_ascii_lowercase() });
        }
        let name = match name.as_str() {
            "root" => "start".to_string(),
            "start" => "start_".to_string(),
            // Lark's rules begin with a letter.
            other => format!("r_{other}"),
        };
        self.out.push_str(&name);
        let mut ahead = self.rest.clone();
        while ahead.next_if(|&c| c == ' ' || c == '\t').is_some() {}
        if ahead.next_if_eq(&':').is_some() {
            if ahead.next() != Some(':') || ahead.next() != Some('=') {
                return Err(wrong(format!("after '{name}' there should be '::='")));
            }
            self.rest = ahead;
            self.out.push(':');
            // The definition may begin on a line of its own.
            while self.rest.next_if(|c| c.is_whitespace()).is_some() {}
            self.out.push(' ');
        }
        Ok(())
    }

    fn string(&mut self) -> Result<(), GrammarError> {
        self.copy();
        loop {
            match self.rest.next() {
                None | Some('\n') => return Err(wrong("a string without its end")),
                Some('"') => break self.out.push('"'),
                Some('\\') => self.escape("\"\\nrt", true)?,
                Some(c) => self.out.push(c),
            }
        }
        Ok(())
    }

    /// A class of characters becomes a regular expression.
    fn class(&mut self) -> Result<(), GrammarError> {
        self.rest.next();
        self.out.push_str("/[");
        loop {
            match self.rest.next() {
                None | Some('\n') => return Err(wrong("a class of characters without its end")),
                Some(']') => break self.out.push_str("]/"),
                Some('\\') => self.escape("\\nrt]-^[\"", false)?,
                // Harmless in GBNF, not in regular expressions.
                Some(c @ ('/' | '[' | '&' | '~')) => self.out.extend(['\\', c]),
                Some(c) => self.out.push(c),
            }
        }
        Ok(())
    }

    fn escape(&mut self, plain: &str, in_string: bool) -> Result<(), GrammarError> {
        match self.rest.next() {
            Some('"') if !in_string => self.out.push('"'),
            Some(c) if plain.contains(c) => self.out.extend(['\\', c]),
            Some(c @ ('x' | 'u' | 'U')) => {
                let digits = match c {
                    'x' => 2,
                    'u' => 4,
                    _ => 8,
                };
                let hex: String = self.rest.by_ref().take(digits).collect();
                let code = u32::from_str_radix(&hex, 16).ok().and_then(char::from_u32);
                let code = code.ok_or_else(|| wrong(format!("'\\{c}{hex}' is no character")))?;
                match in_string {
                    true => self
                        .out
                        .push_str(serde_json::Value::from(code.to_string()).to_string().trim_matches('"')),
                    false => self.out.push_str(&format!("\\u{{{:x}}}", u32::from(code))),
                }
            }
            Some(c) => self.out.push(c),
            None => return Err(wrong("it ends with '\\'")),
        }
        Ok(())
    }
}

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '-' || c == '_'
}

fn wrong(reason: impl Into<String>) -> GrammarError {
    GrammarError::Invalid(format!("no GBNF grammar: {}", reason.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_written_over() {
        let gbnf = "# a list\nroot ::= \"a\\\"\" (item-x\n  | [^a-z/\\n]+)* end\nitem-x ::= \"b\"{2,3} |\n  .\nend ::= \"\\x41\"?";
        let lark = "\nstart: \"a\\\"\" (r_item_x   | /[^a-z\\/\\n]+/)* r_end\nr_item_x: \"b\"{2,3} |   /(?s:.)/\nr_end: \"A\"?";
        let written = to_lark(gbnf).map(|lark| lark.replace("]/+", "]+/"));
        assert_eq!(written.as_deref(), Ok(lark));
    }

    #[test]
    fn what_is_wrong_is_said() {
        for gbnf in ["root ::= \"a", "root ::= (a", "root ::= a)", "root ::= [a", "root := a", "root ::= %"] {
            assert!(to_lark(gbnf).is_err(), "{gbnf}");
        }
    }
}
