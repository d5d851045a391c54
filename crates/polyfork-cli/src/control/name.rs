//! Names of apps: what may be one, which of them a pattern means, and which is near to one that does not exist.
//!
//! A name is also that of a folder, so it has no slash and no leading dot; and it is read in terminals and scripts, so it
//! has no blanks and no control characters either.

use std::fmt;

/// Longest name in bytes.
const LONGEST: usize = 64;

/// The name of an app.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Name(String);

impl Name {
    /// Takes a text that is a name.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn read(text: &str) -> Result<Name, String> {
        if text.is_empty() || text.len() > LONGEST {
            return Err(format!("a name has 1 to {LONGEST} bytes"));
        }
        if text.starts_with(['.', '-']) {
            return Err("a name begins with a letter, a digit or _".into());
        }
        match text.chars().find(|&c| !may_hold(c)) {
            Some(c) => Err(format!("a name has letters, digits and . _ - @ +, not {c:?}")),
            None => Ok(Name(text.to_owned())),
        }
    }

    /// The name nearest to a text that need not be one.
    pub(crate) fn like(text: &str) -> Name {
        let fitting = |c: char| if may_hold(c) { c } else { '-' };
        let text: String = text.chars().map(fitting).collect();
        let text = text.trim_start_matches(['.', '-']);
        let end = (0..=text.len().min(LONGEST)).rev().find(|&end| text.is_char_boundary(end));
        let text = &text[..end.unwrap_or(0)];
        Name(if text.is_empty() { "app".to_owned() } else { text.to_owned() })
    }

    /// The same with a number behind it.
    pub(crate) fn numbered(&self, number: u32) -> Name {
        let tail = format!("-{number}");
        let most = LONGEST - tail.len();
        let end = (0..=self.0.len().min(most)).rev().find(|&end| self.0.is_char_boundary(end));
        Name(format!("{}{tail}", &self.0[..end.unwrap_or(0)]))
    }

    /// As text.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

fn may_hold(c: char) -> bool {
    c.is_alphanumeric() || matches!(c, '.' | '_' | '-' | '@' | '+')
}

/// Whether a text is a pattern rather than a name.
pub(crate) fn is_pattern(text: &str) -> bool {
    text.contains(['*', '?'])
}

/// Whether a pattern means a name: `*` stands for any text, `?` for one character.
///
/// Takes time proportional to the product of the lengths at most: there is one place to go back to, the last star.
pub(crate) fn matches(pattern: &str, name: &str) -> bool {
    let pattern: Vec<char> = pattern.chars().collect();
    let name: Vec<char> = name.chars().collect();
    let (mut p, mut n) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        match pattern.get(p) {
            Some('*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(&c) if c == '?' || c == name[n] => {
                p += 1;
                n += 1;
            }
            _ => match &mut star {
                Some((at, from)) => {
                    *from += 1;
                    (p, n) = (*at + 1, *from);
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|&c| c == '*')
}

/// The names that somebody who wrote `text` may have meant, nearest first, three at most.
pub(crate) fn near<'a>(text: &str, names: impl IntoIterator<Item = &'a Name>) -> Vec<&'a Name> {
    let text = text.trim_matches(['*', '?']).to_lowercase();
    let mut found: Vec<(usize, &Name)> = names
        .into_iter()
        .filter_map(|name| {
            let low = name.0.to_lowercase();
            let distance = distance(&text, &low);
            let contained = text.len() > 1 && (low.contains(&text) || text.contains(&low));
            (distance <= 1 + text.len() / 4 || contained).then_some((distance, name))
        })
        .collect();
    found.sort();
    found.into_iter().take(3).map(|(_, name)| name).collect()
}

/// How many characters must be changed, added or removed to make one text of the other (Levenshtein).
pub(crate) fn distance(one: &str, other: &str) -> usize {
    let other: Vec<char> = other.chars().take(LONGEST).collect();
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (i, a) in one.chars().take(LONGEST).enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, b) in other.iter().enumerate() {
            let change = diagonal + usize::from(a != *b);
            diagonal = row[j + 1];
            row[j + 1] = change.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[other.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_word_that_can_be_a_folder() {
        for good in ["a", "shop", "shop-2", "a.b_c@d+e", "über", "0"] {
            assert_eq!(Name::read(good).expect(good).as_str(), good);
        }
        let long = "x".repeat(65);
        for bad in ["", ".", "..", ".hidden", "-v", "a/b", "../x", "a b", "a\nb", "a\x1b[2J", &long]
        {
            let error = Name::read(bad).expect_err(bad);
            assert!(error.starts_with("a name"), "{error}");
        }
    }

    #[test]
    fn any_text_has_a_name_like_it() {
        for (text, name) in [
            ("server", "server"),
            ("my server", "my-server"),
            ("../../etc", "etc"),
            ("", "app"),
            ("...", "app"),
            ("a\x1b[2J", "a--2J"),
        ] {
            assert_eq!(Name::like(text).as_str(), name);
        }
        for text in ["é".repeat(100), "x".repeat(100), "-".repeat(100)] {
            let like = Name::like(&text);
            assert!(Name::read(like.as_str()).is_ok());
            assert!(Name::read(like.numbered(12).as_str()).is_ok(), "{like}");
        }
    }

    #[test]
    fn patterns_mean_what_a_shell_means() {
        for (pattern, name, yes) in [
            ("*", "shop", true),
            ("sh*", "shop", true),
            ("*op", "shop", true),
            ("s*o*", "shop", true),
            ("s??p", "shop", true),
            ("s?p", "shop", false),
            ("shop", "shop", true),
            ("shop", "shops", false),
            ("*x*", "shop", false),
            ("", "", true),
            ("?", "é", true),
        ] {
            assert_eq!(matches(pattern, name), yes, "{pattern} {name}");
        }
    }

    /// A pattern that makes others go back again and again takes no time here.
    #[test]
    fn no_pattern_takes_long() {
        let name = "a".repeat(5_000);
        assert!(!matches(&format!("{}b", "a*".repeat(100)), &name));
    }

    #[test]
    fn who_mistypes_is_told_what_is_near() {
        let names: Vec<Name> =
            ["shop", "shop-2", "blog", "api"].map(|name| Name::read(name).unwrap()).into();
        let told = |text: &str| -> Vec<String> {
            near(text, &names).iter().map(ToString::to_string).collect()
        };
        assert_eq!(told("shpo"), ["shop"]);
        assert_eq!(told("sho"), ["shop", "shop-2"]);
        assert_eq!(told("apis"), ["api"]);
        assert!(told("nothing-like-it").is_empty());
    }
}
